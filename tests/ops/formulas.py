"""Independent definitions of ops that more than one test compares with: differentiable PyTorch that
computes in the precision of its inputs, as `numerics.matches_fp64` wants them; and their inputs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from glmkern import ops
from tests.ops.numerics import moderate


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """As ChatGLM2's modelling code has it: in float32 (here float64 for float64), rounded once."""
    h = x if x.dtype == torch.float64 else x.float()
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + eps)
    return (weight * h).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, eps), h


def rms_norm_inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """x and weight."""
    x, _, weight = add_rms_norm_inputs(shape, dtype)
    return [x, weight]


def add_rms_norm_inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """x, residual and weight. Errors grow with 1 / rms, so no row is near zero: x and residual have
    the same signs."""
    x = moderate(shape)
    residual = x.sign() * moderate(shape).abs()
    return [t.to(dtype).requires_grad_() for t in (x, residual, moderate(shape[-1:]))]


def rotated(x: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
    """rope by complex numbers, in x's precision (float32 for half), rounded once."""
    rotation = torch.view_as_complex(cos_sin.double())[positions].unsqueeze(1)
    rotation = rotation.conj() if inverse else rotation
    wide = x.double() if x.dtype == torch.float64 else x.float()
    width = 2 * cos_sin.shape[1]
    pairs = torch.view_as_complex(wide[..., :width].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * rotation.to(pairs.dtype)).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | ops.QuantizedWeight,
    labels: Tensor,
    token_weight: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """From all logits, in hidden's precision (float32 for half)."""
    if isinstance(weight, ops.QuantizedWeight):
        weight = ops.dequantize(weight, hidden.dtype)
    logits = hidden @ weight.to(hidden.dtype).T
    logits = logits if hidden.dtype == torch.float64 else logits.float()
    if token_weight is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * token_weight.to(losses.dtype)).sum()
