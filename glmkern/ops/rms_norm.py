"""RMSNorm, and RMSNorm after a residual addition.

    y = x * rsqrt(mean(x^2) + eps) * weight        (Zhang and Sennrich, 2019)

ChatGLM2's order: everything in fp32, one rounding to the input's dtype at the end. With
r = rsqrt(mean(x^2) + eps) and g = dy * weight, dx = r * (g - x * r^2 * mean(g * x)).
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


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square layer normalisation over the last dimension.

    Args:
        x: [..., H], float32, float16, bfloat16 or float64.
        weight: [H], the dtype and device of x.
        eps: added to the mean square; positive.

    Returns:
        [..., H] in x's dtype, computed in float32 (float64 for float64) and rounded once.
        Differentiable in x and weight; the weight's gradient is computed only where asked for.

    Raises:
        ValueError: shapes, dtypes, devices or eps do not fit.
    """
    _check_norm("rms_norm", x, weight, eps)
    return torch.ops.glmkern.rms_norm_fwd(x.contiguous(), weight.contiguous(), eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Adds a residual and normalises the sum: `h = x + residual`, `y = rms_norm(h, weight, eps)`.

    Args:
        x, residual: [..., H], the same shape and dtype.
        weight: [H], the dtype and device of x.
        eps: added to the mean square; positive.

    Returns:
        (y, h), both [..., H] in x's dtype; y is computed from the rounded h. Differentiable in x,
        residual and weight.

    Raises:
        ValueError: shapes, dtypes, devices or eps do not fit.
    """
    _check_norm("add_rms_norm", x, weight, eps)
    check_same("add_rms_norm", "residual", residual, "x", x)
    check(
        residual.shape == x.shape,
        lambda: (
            f"add_rms_norm: residual must have x's shape "
            f"{tuple(x.shape)}, not {tuple(residual.shape)}"
        ),
    )
    y, h, _ = torch.ops.glmkern.add_rms_norm_fwd(
        x.contiguous(), residual.contiguous(), weight.contiguous(), eps
    )
    return y, h


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float) -> None:
    check_floating(op, "x", x)
    check(
        x.dim() >= 1 and weight.shape == x.shape[-1:],
        lambda: (
            f"{op}: weight must have shape "
            f"[{x.shape[-1] if x.dim() else 'H'}], x's last dimension, not {list(weight.shape)}"
        ),
    )
    check(x.shape[-1] > 0, lambda: f"{op}: x's last dimension is empty, x is {tuple(x.shape)}")
    check_same(op, "weight", weight, "x", x)
    check(eps > 0, lambda: f"{op}: eps must be positive, not {eps}")


def rms_norm_fwd_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x.to(accumulate_dtype(x))
    rstd = torch.rsqrt(h.square().mean(-1) + eps)
    y = h * rstd.unsqueeze(-1) * weight
    return y.to(x.dtype), rstd


def add_rms_norm_fwd_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    h = x + residual
    y, rstd = rms_norm_fwd_reference(h, weight, eps)
    return y, h, rstd


def rms_norm_bwd_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(x)
    h, g, r = x.to(acc), dy.to(acc), rstd.unsqueeze(-1)
    normalised = h * r
    dweight = x.new_empty(0)
    if weight_grad:
        dweight = (g * normalised).view(-1, x.shape[-1]).sum(0).to(weight.dtype)
    g = g * weight
    dx = r * (g - normalised * (g * normalised).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + dresidual
    return dx.to(x.dtype), dweight


def _fwd_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))


def _add_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fwd_fake(x, weight, eps)
    return y, torch.empty_like(x), rstd


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(weight.shape if weight_grad else 0)


# dresidual is a gradient that reaches x by another way; it is added before the one rounding.
# dweight is empty unless weight_grad.
define_op(
    "rms_norm_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual,"
    " bool weight_grad) -> (Tensor dx, Tensor dweight)",
    module="rms_norm",
    reference=rms_norm_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.glmkern.rms_norm_bwd(
        dy.contiguous(), x, weight, rstd, None, ctx.needs_input_grad[1]
    )
    return dx, dweight if ctx.needs_input_grad[1] else None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, inputs[2], rstd)


def _add_backward(ctx: Any, dy: Tensor, dh: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.glmkern.rms_norm_bwd(
        dy.contiguous(), h, weight, rstd, dh.contiguous(), ctx.needs_input_grad[2]
    )
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


define_op(
    "rms_norm_fwd",
    "(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    module="rms_norm",
    reference=rms_norm_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(),
    setup_context=_setup_context,
    backward=_backward,
)
define_op(
    "add_rms_norm_fwd",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor h, Tensor rstd)",
    module="rms_norm",
    reference=add_rms_norm_fwd_reference,
    fake=_add_fwd_fake,
    supports=supports_of_kernels(),
    setup_context=_add_setup_context,
    backward=_add_backward,
)
