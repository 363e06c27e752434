"""The trained prefix: pytorch_model.bin with the keys of transformer.prefix_encoder."""

from pathlib import Path

import torch

from glmkern.checkpoint.atomic import write_torch
from glmkern.checkpoint.files import read_tensors, require_float, weight_files
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig

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


def read_prefix(path: str | Path) -> dict[str, torch.Tensor]:
    """The prefix in a folder or weight file, as fp32 under the names inside the prefix encoder.

    {"embedding.weight": [P, kv_size]}, with prefix_projection also trans.{0,2}.{weight,bias}.
    Other weights beside it, such as those of a full checkpoint, are ignored.
    Raises InputError, naming the file, where there is no whole and finite prefix.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(
            f"there is no prefix checkpoint {path}; pass a checkpoint-N folder or its "
            "pytorch_model.bin"
        )
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path) if path.is_dir() else (path,):
        for key, tensor in read_tensors(file).items():
            name = prefix_name(key)
            if name is None:
                continue
            if name in state:
                raise InputError(f"{file} holds {name} of the prefix a second time, as {key}")
            require_float(file, key, tensor)
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"{key} in {file} holds NaN or infinite values, so that training had failed "
                    "when it was saved; use an earlier checkpoint"
                )
            # A copy, so that the file is not held open by its mapping.
            state[name] = tensor.to(torch.float32, copy=True)
    if not state:
        raise InputError(
            f"{path} holds no prefix (no key starts with {OFFICIAL}); pass the checkpoint-N folder "
            "of a P-tuning run"
        )
    _check_names(state, str(path))
    return state


def write_prefix(folder: str | Path, state: dict[str, torch.Tensor]) -> Path:
    """Write pytorch_model.bin with the official names, in fp32, atomically; returns its path.

    `state` is the prefix encoder's state_dict, names as read_prefix returns them.
    """
    if set(state) not in (set(FLAT), set(PROJECTED)):
        raise ValueError(f"a prefix has the weights {PROJECTED} or {FLAT}, not {tuple(state)}")
    path = Path(folder) / "pytorch_model.bin"
    # Copies, because torch.save writes the whole storage of which a tensor may be a part.
    official = {
        OFFICIAL + name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
    write_torch(path, official)
    return path


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
