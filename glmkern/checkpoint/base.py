"""Reading a base model: every tensor under its official name, checked, then streamed."""

from collections.abc import Iterator
from pathlib import Path

import torch

from glmkern.checkpoint.files import read_tensors, require_float, weight_files
from glmkern.checkpoint.prefix import prefix_name
from glmkern.checkpoint.shapes import INV_FREQ, expected_shapes
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig

MAPPED_BYTES = 256 * 2**20

_QUANTISED_CURE = (
    "already quantised folders are not read yet: use the fp16 folder, such as THUDM/chatglm2-6b, "
    "with --quantization_bit"
)


def read_base(folder: str | Path, config: ChatGLMConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (official key, tensor on the CPU) of a base model, one tensor at a time.

    Reads pytorch_model.bin or model.safetensors, single or sharded with an index, in the dtype
    they are stored in. All names, shapes and dtypes are checked before this returns; the weights
    are then mapped from the disk, so that a consumer that keeps none of them has MAPPED_BYTES
    and one tensor in memory at most. inv_freq and prefix_encoder keys are skipped.

    Raises InputError, naming file and key, where the weights are not those of `config`.
    """
    folder = Path(folder)
    expected = expected_shapes(config)
    homes: dict[str, Path] = {}
    prefix_bytes = 0
    for path, promised in weight_files(folder).items():
        tensors = read_tensors(path)
        absent = sorted(promised - tensors.keys())
        if absent:
            raise InputError(
                f"{path} lacks {_some(absent)}, which the index of its folder places there; "
                "download both again"
            )
        scales = [name for name in tensors if name.endswith(".weight_scale")]
        if scales:
            raise InputError(f"{path} holds quantised weights ({scales[0]}); {_QUANTISED_CURE}")
        for name, tensor in tensors.items():
            if prefix_name(name) is not None:
                prefix_bytes += tensor.nbytes
            elif name != INV_FREQ:
                _check_tensor(path, name, tensor, expected, homes)
                homes[name] = path
    if prefix_bytes and not homes:
        raise InputError(
            f"the folder {folder} holds only a prefix ({prefix_bytes / 1e6:.1f} MB), not a base "
            "model; pass it as --ptuning_checkpoint"
        )
    _refuse_quantised_config(folder)
    missing = [name for name in expected if name not in homes]
    if missing:
        raise InputError(
            f"the weights in {folder} lack {_some(missing)}, which config.json asks for "
            f"(num_layers {config.num_layers}); download them again or correct config.json"
        )
    return _stream(homes)


def _stream(homes: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    opened, mapped = None, 0
    for name, path in homes.items():
        # Pages once read stay resident as long as their mapping, so it is renewed now and then.
        if path != opened or mapped > MAPPED_BYTES:
            tensors = read_tensors(path)
            opened, mapped = path, 0
        mapped += tensors[name].nbytes
        yield name, tensors[name]


def _check_tensor(
    path: Path,
    name: str,
    tensor: torch.Tensor,
    expected: dict[str, tuple[int, ...]],
    homes: dict[str, Path],
) -> None:
    if name in homes:
        raise InputError(
            f"{name} is both in {homes[name]} and in {path}; remove the file it does not belong to"
        )
    if name not in expected:
        raise InputError(
            f"{path} holds {name}, which the model that config.json describes does not have; check "
            "that the two belong together and that this is a base model"
        )
    require_float(path, name, tensor)
    if tuple(tensor.shape) != expected[name]:
        raise InputError(
            f"{name} in {path} has shape {list(tensor.shape)}, but config.json asks for "
            f"{list(expected[name])}; check that the two belong together"
        )


def _refuse_quantised_config(folder: Path) -> None:
    path = folder / "config.json"
    bits = ChatGLMConfig.from_pretrained(folder).quantization_bit if path.is_file() else 0
    if bits:
        raise InputError(f"{path} says quantization_bit {bits}; {_QUANTISED_CURE}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
