"""Independent definitions of ops that more than one test compares with: differentiable PyTorch that
computes in the precision of its inputs, as `numerics.matches_fp64` wants them."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """In float32 (float64 for float64), rounded once at the end."""
    h = x if x.dtype == torch.float64 else x.float()
    y = weight * h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor,
                 eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, eps), h
