"""Independent definitions of ops that more than one test compares with: differentiable PyTorch that
computes in the precision of its inputs, as `numerics.matches_fp64` wants them; and their inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.ops.numerics import moderate


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """As ChatGLM2's modelling code has it: in float32 (here float64 for float64), rounded once."""
    h = x if x.dtype == torch.float64 else x.float()
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + eps)
    return (weight * h).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor,
                 eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, eps), h


def rms_norm_inputs(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x and weight."""
    x, _, weight = add_rms_norm_inputs(shape, dtype, device)
    return [x, weight]


def add_rms_norm_inputs(shape: Sequence[int], dtype: torch.dtype,
                        device: str = "cpu") -> list[Tensor]:
    """x, residual and weight. Errors grow with 1 / rms, so no row is near zero: x and residual have
    the same signs."""
    x = moderate(shape)
    residual = x.sign() * moderate(shape).abs()
    return [t.to(device, dtype).requires_grad_() for t in (x, residual, moderate(shape[-1:]))]
