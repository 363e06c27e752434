"""Rotary position embedding (Su et al., 2021) on interleaved pairs of the first channels.

    y[2i] = x[2i] cos a - x[2i+1] sin a,   y[2i+1] = x[2i+1] cos a + x[2i] sin a

The rotation is orthogonal, so the gradient is the rotation by the negative angle.
"""

import torch
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import accumulate_dtype, check, check_device, check_floating, supports_dtype
from glmkern.ops.sequences import values_are_checked


def rope(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotates the first 2R channels of every head by its token's angles.

    Args:
        x: [T, heads, C], float32, float16, bfloat16 or float64; C >= 2R.
        cos_sin: [positions, R, 2], cosine and sine of every position's angles, any floating dtype.
        positions: int64 [T], rows of cos_sin. A position outside the table is a ValueError on the
            CPU; on a GPU it is a precondition, checked under GLMKERN_CHECK=1.

    Returns:
        [T, heads, C] in x's dtype, computed in float32 (float64 for float64) and rounded once; the
        channels from 2R on are copied. Differentiable in x.

    Raises:
        ValueError: shapes, dtypes, devices or positions do not fit.
    """
    check_floating("rope", "x", x)
    check_floating("rope", "cos_sin", cos_sin)
    check_device("rope", "cos_sin", cos_sin, "x", x)
    check_device("rope", "positions", positions, "x", x)
    check(x.dim() == 3, lambda: f"rope: x must be [T, heads, C], not {tuple(x.shape)}")
    check(cos_sin.dim() == 3 and cos_sin.shape[2] == 2 and 2 * cos_sin.shape[1] <= x.shape[2],
          lambda: f"rope: cos_sin must be [positions, R, 2] with 2R <= {x.shape[2]}, the channels "
          f"of x, not {tuple(cos_sin.shape)}")
    check(positions.shape == x.shape[:1] and positions.dtype == torch.int64, lambda: "rope: "
          f"positions must be int64 [{x.shape[0]}], one a token, not {positions.dtype} "
          f"{list(positions.shape)}")
    return torch.ops.glmkern.rope_fwd(x, cos_sin, positions)


def rope_fwd_reference(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    _check_positions(positions, cos_sin)
    cos, sin = cos_sin[positions].to(accumulate_dtype(x)).unsqueeze(1).unbind(-1)  # [T, 1, R]
    return _rotate(x, cos, sin)


def rope_bwd_reference(dy: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    cos, sin = cos_sin[positions].to(accumulate_dtype(dy)).unsqueeze(1).unbind(-1)
    return _rotate(dy, cos, -sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    pairs = x[..., :width].to(cos.dtype).unflatten(-1, (-1, 2))  # [T, heads, R, 2]
    even, odd = pairs.unbind(-1)
    y = x.new_empty(x.shape)
    rotated = y[..., :width].unflatten(-1, (-1, 2))
    rotated[..., 0] = even * cos - odd * sin
    rotated[..., 1] = odd * cos + even * sin
    y[..., width:] = x[..., width:]
    return y


def _check_positions(positions: Tensor, cos_sin: Tensor) -> None:
    if not values_are_checked(positions) or positions.numel() == 0:
        return
    low, high = int(positions.min()), int(positions.max())
    check(0 <= low and high < cos_sin.shape[0], lambda: f"rope: positions run from {low} to {high}"
          f", but the table holds positions 0 to {cos_sin.shape[0] - 1}")


def _fake(x, cos_sin, positions):
    return x.new_empty(x.shape)


define_op("rope_bwd", "(Tensor dy, Tensor cos_sin, Tensor positions) -> Tensor", module="rope",
          reference=rope_bwd_reference, fake=_fake, supports=supports_dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dy):
    return torch.ops.glmkern.rope_bwd(dy, *ctx.saved_tensors), None, None


define_op("rope_fwd", "(Tensor x, Tensor cos_sin, Tensor positions) -> Tensor", module="rope",
          reference=rope_fwd_reference, fake=_fake, supports=supports_dtype,
          setup_context=_setup_context, backward=_backward)
