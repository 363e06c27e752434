"""dropout(x + bias) + residual in one pass; the mask is drawn again in the backward pass.

y = keep * (x + bias) / (1 - p) + residual        keep: see philox.py, i = row * H + channel
"""

from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import (
    accumulate_dtype,
    check,
    check_floating,
    check_same,
    supports_of_kernels,
)
from glmkern.ops.philox import check_dropout, keep_mask
from glmkern.ops.sequences import check_spans, complete_sequences, spans


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    seed: Tensor | None,
    training: bool = True,
    *,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Adds a bias, drops, scales by 1 / (1 - p) and adds a residual.

    Args:
        x: [..., H], float32, float16, bfloat16 or float64.
        bias: [H] or None.
        residual: x's shape and dtype.
        p: probability of dropping an element, in [0, 1).
        seed: int64 [2] = (seed, offset); None where nothing is dropped.
        training: False drops nothing.
        cu_seqlens, sequence_ids: the sequences of x [T, H] (see sequences.py), so that a mask does
            not depend on how sequences are packed; by default all of x is sequence 0.

    Returns:
        x's shape and dtype, computed in float32 (float64 for float64) and rounded once.
        Differentiable in x, bias and residual; nothing is stored for the backward pass.

    Raises:
        ValueError: shapes, dtypes, devices, p, seed or sequences do not fit.
    """
    op = "bias_dropout_add"
    check_floating(op, "x", x)
    check_same(op, "residual", residual, "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] > 0,
        lambda: f"{op}: x needs a last dimension that is not empty, not {tuple(x.shape)}",
    )
    check(
        residual.shape == x.shape,
        lambda: f"{op}: residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}",
    )
    if bias is not None:
        check_same(op, "bias", bias, "x", x)
        check(
            bias.shape == x.shape[-1:],
            lambda: (
                f"{op}: bias must have shape [{x.shape[-1]}], "
                f"x's last dimension, not {list(bias.shape)}"
            ),
        )
    p = p if training else 0.0
    check_dropout(op, x, p, seed)
    if p == 0:
        seed = cu_seqlens = sequence_ids = None
    else:
        check(
            cu_seqlens is None or x.dim() == 2,
            lambda: f"{op}: with cu_seqlens x must be [T, H], not {tuple(x.shape)}",
        )
        rows = x.reshape(-1, x.shape[-1])
        cu_seqlens, sequence_ids = complete_sequences(op, rows, cu_seqlens, sequence_ids)
    return torch.ops.glmkern.bias_dropout_add_fwd(
        x.contiguous(), bias, residual.contiguous(), p, seed, cu_seqlens, sequence_ids
    )


def _scale_of_kept(
    x: Tensor, p: float, seed: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor
) -> Tensor:
    """0 where an element is dropped, 1 / (1 - p) where it is kept; x's shape."""
    channels, acc = x.shape[-1], accumulate_dtype(x)
    keep = [
        keep_mask(seed, sequence_ids[b : b + 1], (end - start) * channels, p).flatten()
        for b, (start, end) in enumerate(spans(cu_seqlens))
    ]
    return torch.cat(keep).view(x.shape).to(acc) / (1 - p)


def bias_dropout_add_fwd_reference(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
) -> Tensor:
    acc = accumulate_dtype(x)
    y = x.to(acc)
    if bias is not None:
        y = y + bias
    if p > 0:
        assert seed is not None and cu_seqlens is not None and sequence_ids is not None
        y = y * _scale_of_kept(x, p, seed, cu_seqlens, sequence_ids)
    return (y + residual).to(x.dtype)


def bias_dropout_add_bwd_reference(
    dy: Tensor, p: float, seed: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    dx = dy * _scale_of_kept(dy, p, seed, cu_seqlens, sequence_ids)
    dbias = dx.view(-1, dy.shape[-1]).sum(0).to(dy.dtype) if bias_grad else dy.new_empty(0)
    return dx.to(dy.dtype), dbias


def _check_fwd_values(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
) -> None:
    if p > 0 and cu_seqlens is not None:
        check_spans("bias_dropout_add", cu_seqlens, x.numel() // x.shape[-1])


def _check_bwd_values(dy: Tensor, p: float, seed: Tensor, cu_seqlens: Tensor, *_: object) -> None:
    check_spans("bias_dropout_add", cu_seqlens, dy.numel() // dy.shape[-1])


def _fwd_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _bwd_fake(
    dy: Tensor, p: float, seed: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dy), dy.new_empty(dy.shape[-1] if bias_grad else 0)


# Only for p > 0: with p = 0 the gradient of x is dy itself.
define_op(
    "bias_dropout_add_bwd",
    "(Tensor dy, float p, Tensor seed, Tensor cu_seqlens,"
    " Tensor sequence_ids, bool bias_grad) -> (Tensor dx, Tensor dbias)",
    module="bias_dropout",
    reference=bias_dropout_add_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(),
    check_values=_check_bwd_values,
    reference_reads_values=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, ctx.p, *sequences = inputs
    ctx.save_for_backward(*sequences)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    bias_grad = ctx.needs_input_grad[1]
    if ctx.p > 0:
        dx, dbias = torch.ops.glmkern.bias_dropout_add_bwd(
            dy.contiguous(), ctx.p, *ctx.saved_tensors, bias_grad
        )
    else:
        dx, dbias = dy, dy.reshape(-1, dy.shape[-1]).sum(0) if bias_grad else None
    return dx, dbias if bias_grad else None, dy, None, None, None, None


define_op(
    "bias_dropout_add_fwd",
    "(Tensor x, Tensor? bias, Tensor residual, float p, Tensor? seed,"
    " Tensor? cu_seqlens, Tensor? sequence_ids) -> Tensor",
    module="bias_dropout",
    reference=bias_dropout_add_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(),
    check_values=_check_fwd_values,
    reference_reads_values=True,
    setup_context=_setup_context,
    backward=_backward,
)
