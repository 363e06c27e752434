"""A folder's weight files, found, opened without running anything in them, and written."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from glmkern.errors import InputError
from glmkern.files.atomic import replaced
from glmkern.files.folder import refuse_lfs_pointer

WEIGHT_SUFFIXES = (".bin", ".safetensors")
# In the order transformers looks for them.
LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# The metadata of a prefix in safetensors that names the family of its base.
FAMILY = "base_family"


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The folder's weight files; for each, the keys that its index promises (none without one).

    Raises InputError for a folder without weights, and for a broken index. So too where an index
    points outside the folder or to a missing file.
    """
    for layout in LAYOUTS:
        path = folder / layout
        if not path.is_file():
            continue
        return _indexed_files(path) if layout.endswith(".json") else {path: set()}
    shards = sorted(folder.glob("*-of-*.bin")) + sorted(folder.glob("*-of-*.safetensors"))
    if shards:
        index = re.sub(r"-\d+-of-\d+", "", shards[0].name) + ".index.json"
        raise InputError(
            f"{folder} holds shards such as {shards[0].name} but no {index}; download that file too"
        )
    raise InputError(
        f"{folder} holds no weights; expected {LAYOUTS[2]}, {LAYOUTS[0]} or shards with "
        f"{LAYOUTS[3]} or {LAYOUTS[1]}"
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one .bin or .safetensors file, mapped from the disk and not yet read.

    Resident memory grows by the pages that are touched and is given back when the tensors go.
    Raises InputError for a file that is damaged or holds anything but named tensors.
    """
    try:
        refuse_lfs_pointer(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise InputError(
            f"{path} holds {code[1] if code else 'pickled objects'} beside tensors, which reading "
            "would execute, so it is refused; save the state dict alone"
        ) from error
    except InputError:
        raise
    except Exception as error:  # on damaged bytes the readers raise whatever they stumble over
        raise InputError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a weight file "
            f"({_first_sentence(error)}); download it again"
        ) from error
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}, not a dictionary of tensors")
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{path} holds a tensor under {name!r}, which is no name")
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{path} holds a {type(value).__name__} under {name!r}, not a tensor; save the "
                "state dict alone"
            )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} for any other file, or a damaged one."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def save_safetensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write contiguous tensors over the file `path`; OSError where the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_torch(path: str | Path, obj: Any) -> None:
    """Replace `path` by torch.save's zip format, atomically; same object, same bytes."""
    with replaced(path) as temporary:
        save_torch(obj, temporary)


def save_torch(obj: Any, path: Path) -> None:
    """torch.save over an existing file; OSError where the disk is full."""
    # Through a file object: given a path, torch.save writes the temporary name into the archive.
    with path.open("wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # A full disk reaches us as a RuntimeError raised while the OSError was handled.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def require_new(target: Path) -> None:
    """Raise InputError where the folder holds a model, a prefix or an adapter already."""
    names = ("config.json", *LAYOUTS, ADAPTER_CONFIG, *ADAPTER_WEIGHTS)
    held = [name for name in names if (target / name).exists()]
    if held:
        raise InputError(f"{target} already holds {held[0]}; choose a new folder")


def require_float(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise InputError where the tensor is not of a real floating dtype, or is sparse."""
    if tensor.layout != torch.strided:
        raise InputError(f"{name} in {path} is a sparse tensor; save it dense")
    if not tensor.dtype.is_floating_point:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} in {path} is {dtype}; expected float16, bfloat16, float32 or float64 weights"
        )


def trained_tensor(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy, so that the file is not held open by its mapping.

    Raises InputError where the tensor is not of a real floating dtype, or not finite.
    """
    require_float(path, name, tensor)
    if not torch.isfinite(tensor).all():
        raise InputError(
            f"{name} in {path} holds NaN or infinite values, so that training had failed when it "
            "was saved; use an earlier checkpoint"
        )
    return tensor.to(torch.float32, copy=True)


def _indexed_files(index: Path) -> dict[Path, set[str]]:
    refuse_lfs_pointer(index)
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        entries = list(content["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a weight index ({error}); download it again") from error
    files: dict[Path, set[str]] = {}
    for name, file in entries:
        if not isinstance(file, str) or file in ("", ".", "..") or set("/\\:\0") & set(file):
            raise InputError(
                f"{index} places {name} in {file!r}, which is not a file of its own folder; "
                "download the index again"
            )
        files.setdefault(index.parent / file, set()).add(name)
    present = set(os.listdir(index.parent))
    for file in files:
        if file.name not in present:
            raise InputError(
                f"{index.name} lists {file.name}, which is not in {index.parent}; download it too"
            )
    if not files:
        raise InputError(f"{index} lists no weights; download it again")
    return files


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is listed twice")
    return values


def _first_sentence(error: Exception) -> str:
    return re.split(r"[.;\n]", str(error).strip() or type(error).__name__, maxsplit=1)[0]
