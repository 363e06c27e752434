"""Linear layers over weights of 4 or 8 bits, in ChatGLM2's per-row symmetric format.

    scale[n] = max_k |w[n, k]| / (2^(bits-1) - 1),  code = round(w / scale),  weight := code * scale

Four bits: byte j of a row holds column 2j in its high and 2j + 1 in its low nibble, both two's
complement. The weight is frozen: a linear is differentiable in x alone, dx = dy @ weight.

A dense weight in half precision, or in x's own, goes the same way: it is used as it is stored.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import (
    check,
    check_device,
    check_floating,
    check_same,
    check_weight,
    supports_dtype,
    supports_of_kernels,
)
from glmkern.ops.swiglu import swiglu_fwd_reference

BLOCK_ELEMENTS = 1 << 24


class QuantizedWeight(NamedTuple):
    """A weight [N, K] of codes and one scale a row.

    packed: int8 [N, K] for 8 bits, [N, K / 2] for 4; scale: [N], floating; bits: 4 or 8.
    """

    packed: Tensor
    scale: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), the shape of the weight that the codes stand for."""
        rows, columns = self.packed.shape
        return rows, columns * 2 if self.bits == 4 else columns


class StoredWeight(NamedTuple):
    """A frozen weight [N, K], dense or quantised, as the registered ops take it.

    data: [N, K], floating, or the codes of a QuantizedWeight; scale: its scales [N], or None for a
    dense weight; bits: those of one element as it is stored, 16, 32 or 64 for a dense weight.
    """

    data: Tensor
    scale: Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.data.shape
        return rows, columns * 2 if self.bits == 4 else columns


def as_stored(weight: QuantizedWeight | Tensor) -> StoredWeight:
    """The same weight as the registered ops take it; shares its memory."""
    if isinstance(weight, Tensor):
        return StoredWeight(weight, None, 8 * weight.element_size())
    return StoredWeight(*weight)


@torch.no_grad()
def quantize(weight: Tensor, bits: int = 4) -> QuantizedWeight:
    """The official codes and scales, computed in the weight's own dtype, rounding half to even.

    Args:
        weight: [N, K], floating, finite; K even for 4 bits.
        bits: 4 or 8.

    Returns:
        QuantizedWeight, the scale in the weight's dtype. An all-zero row has codes and scale 0.

    Raises:
        ValueError: bits, shape, dtype, or a value that is not finite.
    """
    check(bits in (4, 8), lambda: f"quantize: bits must be 4 or 8, not {bits}")
    check(
        weight.dim() == 2 and weight.shape[1] > 0,
        lambda: f"quantize: weight must be [N, K] with K > 0, not {tuple(weight.shape)}",
    )
    check_floating("quantize", "weight", weight)
    check(
        bits == 8 or weight.shape[1] % 2 == 0,
        lambda: (
            f"quantize: 4 bits pack two columns in a byte, so K must be even, not {weight.shape[1]}"
        ),
    )
    largest = torch.maximum(weight.amax(1), -weight.amin(1)).abs()  # zero, never minus zero
    check(
        bool(torch.isfinite(largest).all()),
        lambda: (
            "quantize: row "
            f"{int(torch.isfinite(largest).logical_not().nonzero()[0])} of the weight holds NaN or "
            "infinity"
        ),
    )
    most = 2 ** (bits - 1) - 1
    scale = largest / most
    # A zero scale would divide 0 by 0; any other divisor gives the code 0 that belongs there.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    packed = weight.new_empty(len(weight), weight.shape[1] * bits // 8, dtype=torch.int8)
    # A block of rows at a time: quotients of a whole output layer would take gigabytes.
    size = max(1, BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), size):
        block = slice(start, start + size)
        # Clamped: a scale rounded down in bfloat16 makes the largest code one too many.
        codes = torch.round(weight[block] / divisor[block].unsqueeze(1)).clamp(-most, most)
        codes = codes.to(torch.int8)
        packed[block] = codes if bits == 8 else _pack(codes)
    return QuantizedWeight(packed, scale, bits)


def dequantize(qweight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """code * scale, [N, K] in `dtype`, rounded once.

    Raises:
        ValueError: packed or scale is malformed.
    """
    _check_qweight("dequantize", qweight)
    packed, scale, bits = qweight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (_codes(packed, bits).to(wide) * scale.to(wide).unsqueeze(1)).to(dtype)


def quant_linear(
    x: Tensor, qweight: QuantizedWeight | Tensor, bias: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias over a quantised weight.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64.
        qweight: weight [N, K]; the scale may have another floating dtype than x. Or a dense weight
            [N, K] in x's dtype or narrower: a float32 x takes a float16 or bfloat16 weight.
        bias: [N] in x's dtype, or None.

    Returns:
        [..., N] in x's dtype. Differentiable in x and bias; the weight is frozen.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    op = "quant_linear"
    check_floating(op, "x", x)
    weight = stored(op, qweight, "x", x)
    rows, columns = weight.shape
    check(
        x.dim() >= 1 and x.shape[-1] == columns,
        lambda: (
            f"{op}: x's last dimension must be the "
            f"weight's K = {columns}, but x is {tuple(x.shape)}"
        ),
    )
    if bias is not None:
        check_same(op, "bias", bias, "x", x)
        check(
            bias.shape == (rows,),
            lambda: f"{op}: bias must have shape [{rows}], not {list(bias.shape)}",
        )
    return torch.ops.glmkern.quant_linear_fwd(
        x.contiguous(), *weight, None if bias is None else bias.contiguous()
    )


def stored(op: str, weight: QuantizedWeight | Tensor, x_name: str, x: Tensor) -> StoredWeight:
    """The weight, contiguous, as the registered ops take it. Raises ValueError where it is
    malformed or does not go with x."""
    if isinstance(weight, Tensor):
        check(
            weight.dim() == 2,
            lambda: f"{op}: a dense weight must be [N, K], not {list(weight.shape)}",
        )
        check_weight(op, weight, x_name, x)
        found = as_stored(weight.contiguous())
    else:
        _check_qweight(op, weight)
        found = StoredWeight(weight.packed.contiguous(), weight.scale.contiguous(), weight.bits)
    check_device(op, "the weight", found.data, x_name, x)
    return found


def _check_qweight(op: str, qweight: QuantizedWeight) -> None:
    packed, scale, bits = qweight
    check(bits in (4, 8), lambda: f"{op}: bits must be 4 or 8, not {bits}")
    check(
        packed.dtype == torch.int8 and packed.dim() == 2,
        lambda: (
            f"{op}: packed must be int8 "
            f"[N, bytes of a row], not {packed.dtype} {list(packed.shape)}"
        ),
    )
    check_floating(op, "scale", scale)
    check(
        scale.dim() != 2,
        lambda: (
            f"{op}: grouped scales {list(scale.shape)} are not supported, "
            f"only one scale a row, [{packed.shape[0]}]"
        ),
    )
    check(
        scale.shape == packed.shape[:1],
        lambda: (
            f"{op}: scale must have shape [{packed.shape[0]}], one a row, not {list(scale.shape)}"
        ),
    )
    check_device(op, "scale", scale, "packed", packed)


def _pack(codes: Tensor) -> Tensor:
    return (codes[:, ::2] << 4) | (codes[:, 1::2] & 0xF)


def _codes(packed: Tensor, bits: int) -> Tensor:
    """int8 [N, K]; the shifts are arithmetic, so they extend the nibbles' signs."""
    if bits == 8:
        return packed
    return torch.stack([packed >> 4, (packed << 4) >> 4], -1).flatten(1)


def dense_weight(packed: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`, of a weight as the registered ops take it."""
    if scale is None:
        return packed.to(dtype)
    return dequantize(QuantizedWeight(packed, scale, bits), dtype)


def quant_linear_fwd_reference(
    x: Tensor, packed: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    return F.linear(x, dense_weight(packed, scale, bits, x.dtype), bias)


def quant_linear_swiglu_fwd_reference(
    x: Tensor, packed: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    return swiglu_fwd_reference(quant_linear_fwd_reference(x, packed, scale, bits, bias))


def quant_linear_bwd_reference(
    dy: Tensor, packed: Tensor, scale: Tensor | None, bits: int
) -> Tensor:
    return dy @ dense_weight(packed, scale, bits, dy.dtype)


def _supports(x: Tensor, packed: Tensor, *_: object) -> str | None:
    if packed.dtype == torch.float64:
        return "a float64 weight has no kernel"
    return supports_dtype(x)


def _fwd_fake(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _swiglu_fwd_fake(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0] // 2)


def _bwd_fake(dy: Tensor, packed: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], packed.shape[1] * (2 if bits == 4 else 1))


define_op(
    "quant_linear_bwd",
    "(Tensor dy, Tensor packed, Tensor? scale, int bits) -> Tensor",
    module="quant_linear",
    reference=quant_linear_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(_supports),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, ctx.bits, _ = inputs
    ctx.save_for_backward(packed, scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.glmkern.quant_linear_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.bits)
    if ctx.needs_input_grad[4]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, None, None, None, dbias


# bits counts those of a stored weight: 16 or 32 for a dense one, which has no scale.
define_op(
    "quant_linear_fwd",
    "(Tensor x, Tensor packed, Tensor? scale, int bits, Tensor? bias) -> Tensor",
    module="quant_linear",
    reference=quant_linear_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(_supports),
    setup_context=_setup_context,
    backward=_backward,
)
# For decoding: swiglu(quant_linear(x)) of a weight of gates and ups [2 F, K], without derivative. A
# kernel that does both in one rounds once.
define_op(
    "quant_linear_swiglu_fwd",
    "(Tensor x, Tensor packed, Tensor? scale, int bits, Tensor? bias) -> Tensor",
    module="quant_linear",
    reference=quant_linear_swiglu_fwd_reference,
    fake=_swiglu_fwd_fake,
    supports=supports_of_kernels(_supports),
)
