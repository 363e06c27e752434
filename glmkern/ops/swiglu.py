"""SwiGLU (Shazeer, 2020): silu(first half) * second half of the last dimension.

With s = sigmoid(gate): d gate = dy * up * s * (1 + gate * (1 - s)), d up = dy * gate * s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import accumulate_dtype, check, check_floating, supports_of_kernels


def swiglu(x: Tensor) -> Tensor:
    """silu(x[..., :F]) * x[..., F:].

    Args:
        x: [..., 2F], float32, float16, bfloat16 or float64.

    Returns:
        [..., F] in x's dtype, computed in float32 (float64 for float64) and rounded once.
        Differentiable in x.

    Raises:
        ValueError: x has no last dimension of even size, or another dtype.
    """
    check_floating("swiglu", "x", x)
    check(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        lambda: (
            "swiglu: x's last dimension must hold "
            f"gate and up, two halves of one size, not {tuple(x.shape)}"
        ),
    )
    return torch.ops.glmkern.swiglu_fwd(x.contiguous())


def swiglu_fwd_reference(x: Tensor) -> Tensor:
    gate, up = x.to(accumulate_dtype(x)).chunk(2, -1)
    return F.silu(gate).mul_(up).to(x.dtype)


def swiglu_bwd_reference(dy: Tensor, x: Tensor) -> Tensor:
    acc = accumulate_dtype(x)
    gate, up = x.to(acc).chunk(2, -1)
    g = dy.to(acc)
    dx = torch.empty_like(x)
    dgate, dup = dx.chunk(2, -1)
    torch.mul(F.silu(gate), g, out=dup)
    product = g * up
    if x.dtype == acc:
        torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=dgate)
    else:  # in half the CUDA kernel would round the product first
        dgate.copy_(torch.ops.aten.silu_backward(product, gate))
    return dx


def _fwd_fake(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _bwd_fake(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


define_op(
    "swiglu_bwd",
    "(Tensor dy, Tensor x) -> Tensor",
    module="swiglu",
    reference=swiglu_bwd_reference,
    fake=_bwd_fake,
    supports=supports_of_kernels(),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.glmkern.swiglu_bwd(dy.contiguous(), *ctx.saved_tensors)


define_op(
    "swiglu_fwd",
    "(Tensor x) -> Tensor",
    module="swiglu",
    reference=swiglu_fwd_reference,
    fake=_fwd_fake,
    supports=supports_of_kernels(),
    setup_context=_setup_context,
    backward=_backward,
)
