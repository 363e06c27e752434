"""From a model's name to the local folder that holds it. Nothing is ever downloaded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from glmkern.errors import InputError

# The organisation was renamed on the Hugging Face hub and has a third name on ModelScope.
HUB_ORGANISATIONS = ("THUDM", "zai-org")
MODELSCOPE_ORGANISATION = "ZhipuAI"
LFS_POINTER = b"version https://git-lfs"
REPOSITORY = re.compile(r"(?P<organisation>[\w.-]+)/(?P<model>[\w.-]+)")


def resolve_folder(name_or_path: str | Path) -> Path:
    """The local folder of a model: the path itself, else the download caches, in this order.

    A folder that exists wins. A name such as THUDM/chatglm2-6b is looked up in two caches; it and
    zai-org/chatglm2-6b find each other. First comes the Hugging Face cache (HF_HUB_CACHE, HF_HOME),
    snapshot refs/main or else the newest, then ModelScope's (MODELSCOPE_CACHE).
    Raises InputError where there is none, with the two commands that download the model.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"the folder {path} has no config.json; pass the folder that holds the model's "
                "config.json, weights and tokenizer.model"
            )
        return path
    if path.exists():
        raise InputError(f"{path} is a file; pass the folder of the model that holds config.json")
    match = REPOSITORY.fullmatch(str(name_or_path))
    if match is None or match["organisation"] in (".", ".."):
        raise InputError(
            f"there is no folder {path}; pass the folder of a model, or its name on the hub such "
            "as THUDM/chatglm2-6b"
        )
    for folder in _cached_folders(**match.groupdict()):
        if (folder / "config.json").is_file():
            return folder
    hub, modelscope = _current_names(**match.groupdict())
    raise InputError(
        f"{name_or_path} is neither a local folder nor in the Hugging Face or ModelScope cache; "
        f"download it with `hf download {hub}` or `modelscope download --model {modelscope}`"
    )


def refuse_lfs_pointer(path: Path) -> None:
    """Raise InputError where git cloned a large file's pointer in place of the file."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in "
                f"{path.parent}"
            )


def _cached_folders(organisation: str, model: str) -> Iterator[Path]:
    renamed = organisation in (*HUB_ORGANISATIONS, MODELSCOPE_ORGANISATION)
    others = (*HUB_ORGANISATIONS, MODELSCOPE_ORGANISATION) if renamed else ()
    organisations = list(dict.fromkeys((organisation, *others)))
    for name in organisations:
        yield from _snapshots(_hugging_face_cache() / f"models--{name}--{model}")
    for name in organisations:
        for root in _modelscope_caches():
            # ModelScope keeps dots out of its folder names.
            yield from (root / name / model, root / name / model.replace(".", "___"))


def _snapshots(repository: Path) -> Iterator[Path]:
    """The snapshot refs/main points at, then the others, newest first."""
    snapshots = repository / "snapshots"
    main = repository / "refs" / "main"
    if main.is_file():
        yield snapshots / main.read_text(encoding="utf-8").strip()
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir(), key=lambda s: s.stat().st_mtime, reverse=True)


def _hugging_face_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _modelscope_caches() -> Iterator[Path]:
    """ModelScope's releases disagree on the levels below MODELSCOPE_CACHE; newest form first."""
    root = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    yield from (root / "hub" / "models", root / "hub", root / "models", root)


def _current_names(organisation: str, model: str) -> tuple[str, str]:
    """The repository's name today on the Hugging Face hub and on ModelScope."""
    if organisation in (*HUB_ORGANISATIONS, MODELSCOPE_ORGANISATION):
        return f"{HUB_ORGANISATIONS[-1]}/{model}", f"{MODELSCOPE_ORGANISATION}/{model}"
    return f"{organisation}/{model}", f"{organisation}/{model}"
