"""Rotary position embedding (Su et al., 2021) on interleaved pairs of the first channels.

    y[2i] = x[2i] cos a - x[2i+1] sin a,   y[2i+1] = x[2i+1] cos a + x[2i] sin a

The rotation is orthogonal, so the gradient is the rotation by the negative angle.
"""

from typing import Any

import torch
from torch import Tensor

from glmkern.dispatch import define_op
from glmkern.ops.checks import (
    accumulate_dtype,
    check,
    check_device,
    check_floating,
    supports_dtype,
    supports_of_kernels,
)


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
    check(
        cos_sin.dim() == 3 and cos_sin.shape[2] == 2 and 2 * cos_sin.shape[1] <= x.shape[2],
        lambda: (
            f"rope: cos_sin must be [positions, R, 2] with 2R <= {x.shape[2]}, the channels "
            f"of x, not {tuple(cos_sin.shape)}"
        ),
    )
    check(
        positions.shape == x.shape[:1] and positions.dtype == torch.int64,
        lambda: (
            "rope: "
            f"positions must be int64 [{x.shape[0]}], one a token, not {positions.dtype} "
            f"{list(positions.shape)}"
        ),
    )
    return torch.ops.glmkern.rope_fwd(x, cos_sin, positions)


def rope_fwd_reference(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    return _rotate(x, x.new_empty(x.shape), *_angles(x, cos_sin, positions))


def rope_bwd_reference(dy: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    cos, sin = _angles(dy, cos_sin, positions)
    return _rotate(dy, dy.new_empty(dy.shape), cos, -sin)


def qkv_rope_fwd_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = qkv.to(accumulate_dtype(qkv))
    if bias is not None:
        wide = wide + bias
    q, k, v = _split_qkv(wide, heads, groups, interleaved)
    angles = _angles(qkv, cos_sin, positions)
    q, k = (_rotate(x, x.new_empty(x.shape, dtype=qkv.dtype), *angles) for x in (q, k))
    return q, k, v.to(qkv.dtype, copy=True, memory_format=torch.contiguous_format)


def qkv_rope_cache_fwd_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    q, k, v = qkv_rope_fwd_reference(qkv, bias, cos_sin, positions, heads, groups, interleaved)
    keys.index_copy_(0, slots, k)
    values.index_copy_(0, slots, v)
    return q


def qkv_rope_bwd_reference(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    heads, groups = dq.shape[1], dk.shape[1]
    dqkv = dq.new_empty(dq.shape[0], (heads + 2 * groups) * dq.shape[2])
    parts = _split_qkv(dqkv, heads, groups, interleaved)
    cos, sin = _angles(dq, cos_sin, positions)
    _rotate(dq, parts[0], cos, -sin)
    _rotate(dk, parts[1], cos, -sin)
    parts[2].copy_(dv)
    return dqkv


def _split_qkv(
    qkv: Tensor, heads: int, groups: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [T, heads, C], k and v [T, groups, C] of qkv [T, (heads + 2 groups) * C]; where
    `interleaved`, q, k and v of one head lie side by side."""
    parts: tuple[Tensor, ...]
    if interleaved:
        parts = torch.unflatten(qkv, 1, (heads, 3, -1)).unbind(2)
    else:
        heads_of_all = torch.unflatten(qkv, 1, (heads + 2 * groups, -1))
        parts = torch.split(heads_of_all, [heads, groups, groups], 1)
    q, k, v = parts
    return q, k, v


def _angles(x: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, [T, 1, R] in the dtype that x is rotated in."""
    cos, sin = cos_sin[positions].to(accumulate_dtype(x)).unsqueeze(1).unbind(-1)
    return cos, sin


def _rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Writes x [T, heads, C], rotated, to y, and returns y."""
    width = 2 * cos.shape[-1]
    pairs = torch.unflatten(x[..., :width].to(cos.dtype), -1, (-1, 2))  # [T, heads, R, 2]
    even, odd = pairs.unbind(-1)
    rotated = torch.unflatten(y[..., :width], -1, (-1, 2))
    rotated[..., 0] = even * cos - odd * sin
    rotated[..., 1] = odd * cos + even * sin
    y[..., width:] = x[..., width:]
    return y


def _check_positions(cos_sin: Tensor, positions: Tensor) -> None:
    """Raises ValueError for a position outside the table; reads the values back from the device."""
    _check_range("positions", positions, "the table holds positions", cos_sin.shape[0])


def _check_range(name: str, indices: Tensor, held: str, size: int) -> None:
    """Raises ValueError where one of the indices does not lie from 0 to size - 1."""
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    check(
        0 <= low and high < size,
        lambda: f"rope: {name} run from {low} to {high}, but {held} 0 to {size - 1}",
    )


def _check_values(x: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    _check_positions(cos_sin, positions)


def _fake(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _qkv_fwd_fake(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    channels = qkv.shape[1] // (heads + 2 * groups)
    return tuple(qkv.new_empty(qkv.shape[0], n, channels) for n in (heads, groups, groups))


def _qkv_cache_fwd_fake(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    *_: object,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], heads, qkv.shape[1] // (heads + 2 * groups))


def _qkv_bwd_fake(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool
) -> Tensor:
    return dq.new_empty(dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2])


def _supports(x: Tensor, cos_sin: Tensor, *_: object) -> str | None:
    return supports_dtype(x) or supports_dtype(cos_sin)


def _qkv_fwd_supports(qkv: Tensor, bias: Tensor | None, cos_sin: Tensor, *_: object) -> str | None:
    return _supports(qkv, cos_sin)


def _qkv_cache_fwd_supports(
    qkv: Tensor, bias: Tensor | None, cos_sin: Tensor, *others: Any
) -> str | None:
    return _supports(qkv, cos_sin) or _why_not_in_pieces(*others[4:6])


def _why_not_in_pieces(keys: Tensor, values: Tensor) -> str | None:
    if _is_of_rows(keys) and _is_of_rows(values):
        return None
    return "an entry of keys or values is not contiguous"


def _is_of_rows(entries: Tensor) -> bool:
    """Whether each entry of [entries, G, C] lies in one piece."""
    return entries.stride(2) == 1 and entries.stride(1) == entries.shape[2]


def _qkv_bwd_supports(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, *_: object
) -> str | None:
    return _supports(dq, cos_sin)


def _check_qkv_fwd_values(
    qkv: Tensor, bias: Tensor | None, cos_sin: Tensor, positions: Tensor, *_: object
) -> None:
    _check_positions(cos_sin, positions)


def _check_qkv_cache_fwd_values(
    qkv: Tensor,
    bias: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor,
    heads: int,
    groups: int,
    interleaved: bool,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> None:
    _check_positions(cos_sin, positions)
    _check_range("slots", slots, "the cache has", keys.shape[0])


def _check_qkv_bwd_values(
    dq: Tensor, dk: Tensor, dv: Tensor, cos_sin: Tensor, positions: Tensor, *_: object
) -> None:
    _check_positions(cos_sin, positions)


define_op(
    "rope_bwd",
    "(Tensor dy, Tensor cos_sin, Tensor positions) -> Tensor",
    module="rope",
    reference=rope_bwd_reference,
    fake=_fake,
    supports=supports_of_kernels(_supports),
    check_values=_check_values,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.glmkern.rope_bwd(dy, *ctx.saved_tensors), None, None


define_op(
    "rope_fwd",
    "(Tensor x, Tensor cos_sin, Tensor positions) -> Tensor",
    module="rope",
    reference=rope_fwd_reference,
    fake=_fake,
    supports=supports_of_kernels(_supports),
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)

# For a layer's own backward: all that lies between the product with query_key_value's weight and
# attention, in one pass. The forward adds the bias to qkv [T, (heads + 2 groups) * C], whose rows
# may be slices of wider ones. It returns rotated q [T, heads, C] and k [T, groups, C], and a copy
# of v [T, groups, C]. The backward computes the gradient of qkv from theirs. `interleaved`: see
# _split_qkv.
define_op(
    "qkv_rope_bwd",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor cos_sin, Tensor positions,"
    " bool interleaved) -> Tensor",
    module="rope",
    reference=qkv_rope_bwd_reference,
    fake=_qkv_bwd_fake,
    supports=supports_of_kernels(_qkv_bwd_supports),
    check_values=_check_qkv_bwd_values,
)
define_op(
    "qkv_rope_fwd",
    "(Tensor qkv, Tensor? bias, Tensor cos_sin, Tensor positions, int heads,"
    " int groups, bool interleaved) -> (Tensor q, Tensor k, Tensor v)",
    module="rope",
    reference=qkv_rope_fwd_reference,
    fake=_qkv_fwd_fake,
    supports=supports_of_kernels(_qkv_fwd_supports),
    check_values=_check_qkv_fwd_values,
)
# The same for decoding: rotated k, and v, go to the entries `slots`, int64 [T] and distinct, of
# keys and values [entries, groups, C], whose other entries stay.
define_op(
    "qkv_rope_cache_fwd",
    "(Tensor qkv, Tensor? bias, Tensor cos_sin, Tensor positions, int heads,"
    " int groups, bool interleaved, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> Tensor q",
    module="rope",
    reference=qkv_rope_cache_fwd_reference,
    fake=_qkv_cache_fwd_fake,
    supports=supports_of_kernels(_qkv_cache_fwd_supports) | {"triton": _qkv_fwd_supports},
    check_values=_check_qkv_cache_fwd_values,
)
