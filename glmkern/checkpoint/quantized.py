"""A base in 4 or 8 bits: quantised as it streams, and as a folder of its own."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from glmkern import ops
from glmkern.checkpoint.base import read_base
from glmkern.checkpoint.base_writer import write_base
from glmkern.checkpoint.shapes import OUTPUT_LAYER, SCALE, WEIGHT, is_linear_weight
from glmkern.checkpoint.tensor_files import WEIGHT_SUFFIXES, require_new
from glmkern.errors import InputError
from glmkern.files.folder import resolve_folder
from glmkern.model.config import ChatGLMConfig

# Tokenizer, configurations and modelling code of an official folder are far smaller.
COMPANION_BYTES = 20_000_000


def quantize_stream(
    tensors: Iterable[tuple[str, torch.Tensor]],
    bits: int | None,
    output_layer_bit: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream with codes and scales in place of the linears' dense weights.

    Args:
        tensors: pairs of an official name and a tensor.
        bits: 4 or 8 for every layer's linears; None or 0 leaves them.
        output_layer_bit: the same for the output layer.

    Quantised in the dtype they arrive in, so an official fp16 base gets the official codes and
    scales, bit for bit. Everything else passes as it is, and so do codes.
    """
    for name, tensor in tensors:
        wanted = output_layer_bit if name == OUTPUT_LAYER else is_linear_weight(name) and bits
        if wanted and tensor.is_floating_point():
            codes, scale, _ = ops.quantize(tensor, wanted)
            yield name, codes
            yield name.removesuffix(WEIGHT) + SCALE, scale
        else:
            yield name, tensor


def dequantize_stream(
    tensors: Iterable[tuple[str, torch.Tensor]], bits: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream with dense weights in place of codes and scales of `bits` bits.

    A weight is code * scale, rounded once to the scale's dtype, as in the official code. All else
    passes as it is.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if not (tensor.dtype == torch.int8 or name.endswith(SCALE)):
            yield name, tensor
            continue
        weight = name if tensor.dtype == torch.int8 else name.removesuffix(SCALE) + WEIGHT
        other = waiting.pop(weight, None)
        if other is None:
            waiting[weight] = tensor
            continue
        codes, scale = (other, tensor) if other.dtype == torch.int8 else (tensor, other)
        yield weight, ops.dequantize(ops.QuantizedWeight(codes, scale, bits), scale.dtype)


def check_bits(folder: Path, config: ChatGLMConfig, bits: int) -> None:
    """Raise InputError where the base in `folder`, whose config.json is `config`, cannot be had in
    `bits` bits."""
    if bits not in (4, 8):
        raise InputError(f"a base can be quantised to 4 or 8 bits, not {bits}")
    stored = config.quantization_bit
    if stored not in (0, bits):
        raise InputError(
            f"{folder} is quantised to {stored} bits already; use the fp16 folder to have it in "
            f"{bits} bits"
        )
    odd = [n for n in (config.hidden_size, config.query_size, config.ffn_hidden_size) if n % 2]
    if bits == 4 and odd:
        raise InputError(
            f"4 bits pack two columns in a byte, but linears of {folder} have {odd[0]} columns; "
            "use 8 bits"
        )


def quantize_folder(
    source: str | Path, target: str | Path, bits: int, layout: str = "safetensors"
) -> Path:
    """Write the base in `source` with linears of 4 or 8 bits to the new folder `target`.

    One tensor is in memory at a time, and one shard of the result. Tokenizer, configurations and
    whatever else lies beside the weights are copied; config.json says quantization_bit.

    Args:
        source: a folder, or the cached name, of a base in the official layout.
        target: a folder that holds no model yet.
        bits: 4 or 8.
        layout: "safetensors", or "bin" for the official code.

    Returns:
        The folder `target`.

    Raises:
        InputError: the source is broken or quantised already, the target holds a model or cannot
            be written.
    """
    folder, target = resolve_folder(source), Path(target)
    config = ChatGLMConfig.from_pretrained(folder)
    check_bits(folder, config, bits)
    if config.quantization_bit:
        raise InputError(f"{folder} is quantised to {bits} bits already; copy it as it is")
    require_new(target)
    write_base(
        target,
        # A prefix in the folder is not part of the base.
        replace(config, quantization_bit=bits, pre_seq_len=None, prefix_projection=False),
        quantize_stream(read_base(folder, config), bits),
        layout=layout,
        companions=[path for path in folder.iterdir() if _is_companion(path)],
    )
    return target


def _is_companion(path: Path) -> bool:
    return (
        path.is_file()
        and path.name != "config.json"
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and path.stat().st_size <= COMPANION_BYTES
    )
