"""The trained prefix: the keys of transformer.prefix_encoder, read from and written to files."""

from contextlib import suppress
from pathlib import Path

import torch

from glmkern.checkpoint.adapter import is_adapter, read_adapter
from glmkern.checkpoint.tensor_files import (
    ADAPTER_WEIGHTS,
    FAMILY,
    LAYOUTS,
    read_metadata,
    read_tensors,
    save_safetensors,
    trained_tensor,
    weight_files,
    write_torch,
)
from glmkern.errors import InputError
from glmkern.files.atomic import replaced
from glmkern.model.config import UNKNOWN_FAMILY, ChatGLMConfig
from glmkern.model.prefix import PrefixEncoder

OFFICIAL = "transformer.prefix_encoder."
FLAT = ("embedding.weight",)
PROJECTED = (*FLAT, "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


def prefix_name(key: str) -> str | None:
    """The key inside the prefix encoder ("embedding.weight"), or None for any other weight.

    Known spellings: transformer.prefix_encoder.*, prefix_encoder.*, and the bare names.
    """
    for start in (OFFICIAL, "prefix_encoder."):
        if key.startswith(start):
            return key[len(start) :]
    return key if key in PROJECTED else None


def read_prefix(path: str | Path, config: ChatGLMConfig | None = None) -> dict[str, torch.Tensor]:
    """The prefix in a folder or weight file, as fp32 under the names inside the prefix encoder.

    {"embedding.weight": [P, kv_size]}, with prefix_projection also trans.{0,2}.{weight,bias}.
    Other weights beside it, such as those of a full checkpoint, are ignored. pytorch_model.bin and
    model.safetensors give the bits that were written. In a PEFT adapter the first half of each key
    was rotated and rounded: those numbers differ by at most 2^-23 times their pair.
    An adapter is checked against `config`, of the base to be loaded (see read_adapter).
    Raises InputError, naming the file, where there is no whole and finite prefix.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(
            f"there is no prefix checkpoint {path}; pass a checkpoint-N folder or its "
            "pytorch_model.bin"
        )
    if is_adapter(path):
        return {FLAT[0]: read_adapter(path, config)}
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path) if path.is_dir() else (path,):
        for key, tensor in read_tensors(file).items():
            name = prefix_name(key)
            if name is None:
                continue
            if name in state:
                raise InputError(f"{file} holds {name} of the prefix a second time, as {key}")
            state[name] = trained_tensor(file, key, tensor)
    if not state:
        raise InputError(
            f"{path} holds no prefix (no key starts with {OFFICIAL}); pass the checkpoint-N folder "
            "of a P-tuning run"
        )
    _check_names(state, str(path))
    return state


def write_prefix(
    folder: str | Path,
    state: dict[str, torch.Tensor],
    layout: str = "bin",
    family: str = UNKNOWN_FAMILY,
) -> Path:
    """Write the prefix under the official names, in fp32, atomically; returns the file's path.

    `state` is the prefix encoder's state_dict, names as read_prefix returns them. "bin" is the
    official pytorch_model.bin; "safetensors" is model.safetensors, which says the base's `family`.
    """
    if set(state) not in (set(FLAT), set(PROJECTED)):
        raise ValueError(f"a prefix has the weights {PROJECTED} or {FLAT}, not {tuple(state)}")
    if layout not in ("bin", "safetensors"):
        raise ValueError(f"layout must be 'bin' or 'safetensors', not {layout!r}")
    # Copies, because torch.save writes the whole storage of which a tensor may be a part.
    official = {
        OFFICIAL + name: state[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in PROJECTED
        if name in state
    }
    if layout == "bin":
        path = Path(folder) / "pytorch_model.bin"
        write_torch(path, official)
        return path
    path = Path(folder) / "model.safetensors"
    with replaced(path) as temporary:
        save_safetensors(official, temporary, {FAMILY: family})
    return path


def fold_prefix(state: dict[str, torch.Tensor], config: ChatGLMConfig) -> dict[str, torch.Tensor]:
    """The flat prefix that a projected one amounts to, computed by the model's own encoder."""
    length, _, projection = describe_prefix(state)
    encoder = PrefixEncoder(config, length, projection)
    encoder.load_state_dict(state)
    with torch.no_grad():
        segments = [each for pair in encoder() for each in pair]  # 2L of [P, G, C]
    return {FLAT[0]: torch.stack(segments, 1).flatten(1)}


def prefix_family(path: str | Path) -> str:
    """The family of the base a prefix was trained on, as its safetensors or the config.json beside
    it say; UNKNOWN_FAMILY where neither does."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    names = (*ADAPTER_WEIGHTS, *LAYOUTS) if path.is_dir() else (path.name,)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    family = UNKNOWN_FAMILY if file is None else read_metadata(file).get(FAMILY, UNKNOWN_FAMILY)
    if family == UNKNOWN_FAMILY:
        with suppress(InputError):
            family = ChatGLMConfig.from_pretrained(folder).family
    return family


def check_family(path: str | Path, config: ChatGLMConfig) -> None:
    """Raise InputError where the prefix at `path` is known to be of another base than `config`.

    The family's members have the same shapes, so that nothing else would tell.
    """
    trained = prefix_family(path)
    if UNKNOWN_FAMILY not in (trained, config.family) and trained != config.family:
        raise InputError(
            f"the prefix {path} was trained on {trained}, but the base is {config.family}; load it "
            f"on {trained}, or train a prefix on this base"
        )


def describe_prefix(state: dict[str, torch.Tensor]) -> tuple[int, int, bool]:
    """(pre_seq_len, columns, whether it goes through the projection) of a prefix."""
    _check_names(state, "the prefix")
    projection = len(state) > len(FLAT)
    pre_seq_len, columns = state["embedding.weight"].shape
    return pre_seq_len, state["trans.2.weight"].shape[0] if projection else columns, projection


def check_prefix(
    state: dict[str, torch.Tensor],
    config: ChatGLMConfig,
    pre_seq_len: int,
    prefix_projection: bool,
    source: str | Path = "the prefix checkpoint",
) -> None:
    """Raise InputError, naming `source`, where the prefix is not the one that was asked for."""
    length, columns, projection = describe_prefix(state)
    if projection != prefix_projection:
        trained, cure = ("with", "add") if projection else ("without", "remove")
        raise InputError(
            f"{source} was trained {trained} prefix_projection; {cure} --prefix_projection"
        )
    if length != pre_seq_len:
        raise InputError(
            f"{source} holds {length} virtual tokens, but pre_seq_len is {pre_seq_len}; pass "
            f"--pre_seq_len {length}"
        )
    if columns != config.kv_size:
        raise InputError(
            f"{source} has {columns} columns, but this base needs {config.kv_size} (num_layers "
            f"{config.num_layers} x 2 x multi_query_group_num {config.multi_query_group_num} x "
            f"kv_channels {config.kv_channels}); it was trained on another base model"
        )
    for name, shape in _projection_shapes(config, length).items() if projection else ():
        if tuple(state[name].shape) != shape:
            raise InputError(
                f"{name} of {source} has shape {list(state[name].shape)}, but this base needs "
                f"{list(shape)}; it was trained on another base model or an early release"
            )


def _projection_shapes(config: ChatGLMConfig, pre_seq_len: int) -> dict[str, tuple[int, ...]]:
    hidden, columns = config.hidden_size, config.kv_size
    shapes = ((pre_seq_len, columns), (hidden, columns), (hidden,), (columns, hidden), (columns,))
    return dict(zip(PROJECTED, shapes, strict=True))


def _check_names(state: dict[str, torch.Tensor], source: str) -> None:
    for name in sorted(state.keys() - set(PROJECTED)):
        raise InputError(f"{source} holds {name}, which no prefix encoder has")
    for name in FLAT if state.keys() <= set(FLAT) else PROJECTED:
        if name not in state:
            raise InputError(f"{source} lacks {name} of the prefix encoder; use a whole checkpoint")
        dimensions = 1 if name.endswith("bias") else 2
        if state[name].dim() != dimensions:
            raise InputError(
                f"{name} of {source} has shape {list(state[name].shape)}, but the prefix encoder's "
                f"has {dimensions} dimensions; use a whole checkpoint"
            )
    if len(state["embedding.weight"]) == 0:
        raise InputError(f"{source} has no virtual tokens; use a whole checkpoint")
