"""Reading a base model: every tensor under its official name, checked, then streamed."""

from collections.abc import Iterator
from pathlib import Path

import torch

from glmkern.checkpoint.native_glm import LM_HEAD, from_glm_stream, glm_shapes, native_config
from glmkern.checkpoint.prefix import prefix_name
from glmkern.checkpoint.shapes import INV_FREQ, SCALE, WEIGHT, expected_shapes, is_linear_weight
from glmkern.checkpoint.tensor_files import read_tensors, require_float, weight_files
from glmkern.errors import InputError
from glmkern.model.config import ChatGLMConfig

MAPPED_BYTES = 256 * 2**20


def read_base(folder: str | Path, config: ChatGLMConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream (official key, tensor on the CPU) of a base model, one tensor at a time.

    Reads pytorch_model.bin or model.safetensors, single or sharded with an index, in the dtype
    they are stored in. inv_freq and prefix_encoder keys are skipped. Where config.json says

    * quantization_bit 4 or 8, the linears' weights are int8 codes; the <module>.weight_scale of
      each follows at some later point;
    * model_type "glm", the native names come as the official ones.

    All names, shapes and dtypes are checked before this returns, values as they pass. The weights
    are mapped from the disk: a consumer that keeps none of them has at most MAPPED_BYTES and one
    tensor in memory.

    Raises InputError, naming file and key, where the weights are not those of `config`. So too
    where they hold NaN, infinity or a negative scale.
    """
    folder = Path(folder)
    bits = stored_bits(folder)
    native = native_config(folder)
    expected = expected_shapes(config, bits) if native is None else glm_shapes(config)
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
        for name, tensor in tensors.items():
            if prefix_name(name) is not None:
                prefix_bytes += tensor.nbytes
            elif name != INV_FREQ:
                _check_kind(path, name, tensor, bits, config)
                _check_tensor(path, name, tensor, expected, homes)
                homes[name] = path
    if prefix_bytes and not homes:
        raise InputError(
            f"the folder {folder} holds only a prefix ({prefix_bytes / 1e6:.1f} MB), not a base "
            "model; pass it as --ptuning_checkpoint"
        )
    # As transformers has it, an output layer in the files is its own whatever config.json says.
    tied = bool(native and native.get("tie_word_embeddings")) and LM_HEAD not in homes
    if tied:
        del expected[LM_HEAD]
    missing = [name for name in expected if name not in homes]
    if missing:
        raise InputError(
            f"the weights in {folder} lack {_some(missing)}, which config.json asks for "
            f"(num_layers {config.num_layers}); download them again or correct config.json"
        )
    if native is None:
        return _stream(homes)
    # In the model's order, so that q, k and v follow each other.
    return from_glm_stream(_stream({name: homes[name] for name in expected}), config, tied)


def stored_bits(folder: Path) -> int:
    """4 or 8 where config.json says that the folder's weights are codes, else 0."""
    path = folder / "config.json"
    return ChatGLMConfig.from_pretrained(folder).quantization_bit if path.is_file() else 0


def _stream(homes: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    opened, mapped = None, 0
    for name, path in homes.items():
        # A page that was read stays resident as long as its mapping, so the mapping is renewed.
        if path != opened or mapped > MAPPED_BYTES:
            tensors = read_tensors(path)
            opened, mapped = path, 0
        mapped += tensors[name].nbytes
        _check_values(path, name, tensors[name])
        yield name, tensors[name]


def _check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise InputError(f"{name} in {path} holds NaN or infinite values; download it again")
    if name.endswith(SCALE) and low < 0:
        raise InputError(
            f"{name} in {path} holds a negative scale ({low.item():g}); download it again"
        )


def _check_kind(
    path: Path, name: str, tensor: torch.Tensor, bits: int, config: ChatGLMConfig
) -> None:
    """Codes are where config.json says so, and have as many bits."""
    if name.endswith(SCALE) and not bits:
        raise InputError(
            f"{path} holds scales of quantised weights ({name}), but config.json does not say "
            "quantization_bit; set it there to 4 or 8, whichever the weights have"
        )
    if not is_linear_weight(name):
        return
    is_codes = tensor.dtype == torch.int8
    if is_codes and not bits:
        raise InputError(
            f"{name} in {path} is int8, but config.json does not say quantization_bit; set it "
            "there to 4 or 8, whichever the weights have"
        )
    if bits and not is_codes:
        raise InputError(
            f"config.json says quantization_bit {bits}, but {name} in {path} is "
            f"{_plain(tensor.dtype)}, not int8 codes; remove quantization_bit from config.json to "
            "load the weights as they are, and pass --quantization_bit to quantise them"
        )
    other = 12 - bits
    if bits and tuple(tensor.shape) == expected_shapes(config, other).get(name):
        raise InputError(
            f"config.json says quantization_bit {bits}, but {name} in {path} has the shape of "
            f"{other}-bit codes, {list(tensor.shape)}; correct config.json"
        )


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
    if not (tensor.dtype == torch.int8 and name.removesuffix(WEIGHT) + SCALE in expected):
        require_float(path, name, tensor)
    if tuple(tensor.shape) != expected[name]:
        raise InputError(
            f"{name} in {path} has shape {list(tensor.shape)}, but config.json asks for "
            f"{list(expected[name])}; check that the two belong together"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
