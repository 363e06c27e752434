"""Products with 4-bit weights on tensor cores, which decode the weights on their way.

Byte j of a row holds columns 2j and 2j + 1. JOINED tiles put the two side by side again, where the
tensor cores take them so. Others treat even and odd columns apart: the forward splits x and adds
two products, the backward has two accumulators and interleaves them once, where it stores them. A
warp decodes the weights that it alone multiplies with: Triton lays the warps along the weights'
rows (forward, BN >= BM) or columns (backward, BJ > BM).

A split walks `blocks` blocks of the reduction. One split alone writes the result; several write
partial sums in fp32 that `sum_splits_kernel` adds in order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from glmkern.triton_kernels.quant_linear.decode import decode_pair
from glmkern.triton_kernels.swiglu import gated


class FusedTile(NamedTuple):
    """Of BM tokens; forward: `rows` of the weight, reduced over blocks of `bytes` a row; backward:
    `bytes` of each row, that is twice as many columns, reduced over blocks of `rows`."""

    BM: int
    rows: int
    bytes: int
    num_warps: int
    num_stages: int
    joined: bool = False


# Chosen by the loops that come out of the compiler (bench.triton_loops; bench/NOTES.md). An sm_90
# multiplies with x from shared memory as it was loaded; x that is split goes through registers and
# back, and took longer than the product.
_FEW = (FusedTile(16, 64, 64, 4, 4), FusedTile(32, 64, 64, 4, 4))
FWD_TILES = {
    64: (FusedTile(16, 64, 32, 4, 3), FusedTile(32, 64, 32, 4, 3), FusedTile(64, 128, 32, 4, 3)),
    99: (*_FEW, FusedTile(64, 128, 32, 4, 3)),
    163: (*_FEW, FusedTile(64, 128, 32, 4, 4), FusedTile(128, 128, 32, 8, 4)),
    227: (
        FusedTile(16, 64, 64, 4, 4, joined=True),
        FusedTile(32, 64, 64, 4, 4, joined=True),
        FusedTile(64, 128, 32, 4, 4, joined=True),
        FusedTile(128, 128, 32, 8, 3, joined=True),
    ),
}
_FEW = (FusedTile(16, 64, 64, 4, 4), FusedTile(32, 32, 64, 4, 4))
BWD_TILES = {
    64: (FusedTile(16, 32, 64, 4, 3), FusedTile(32, 32, 64, 4, 3), FusedTile(64, 32, 128, 4, 3)),
    # With 32 rows Triton 3.6 spills two registers on sm_120.
    99: (*_FEW, FusedTile(64, 16, 128, 4, 4)),
    163: (*_FEW, FusedTile(64, 32, 128, 4, 3)),
    227: (
        *_FEW,
        FusedTile(64, 64, 128, 4, 3, joined=True),
        FusedTile(128, 64, 128, 8, 3, joined=True),
    ),
}
# float32 has no tensor cores that keep its precision; these tiles serve few tokens.
FWD_TILES_FP32 = {64: (FusedTile(16, 64, 16, 4, 3), FusedTile(32, 64, 16, 4, 3))}
BWD_TILES_FP32 = {64: (FusedTile(16, 16, 64, 4, 3), FusedTile(32, 16, 64, 4, 3))}


@triton.jit
def tile_indices(M, TILES: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr):
    """(token tile, weight tile) of this program. GROUP token tiles take each weight tile in turn:
    programs that run together then read few weights and few tokens, from the L2 cache."""
    i_p = tl.program_id(0)
    i_first = i_p // (GROUP * TILES) * GROUP
    group = tl.minimum(tl.cdiv(M, BM) - i_first, GROUP)
    i_p = i_p % (GROUP * TILES)
    return i_first + i_p % group, i_p // group


@triton.jit
def load_tile(p_tile, m_rows, o_columns, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Zero outside the matrix; MASKED says whether columns can be."""
    if MASKED:
        m_tile = m_rows[:, None] & (o_columns < COLUMNS)[None, :]
        return tl.load(p_tile, mask=m_tile, other=0)
    else:
        return tl.load(p_tile, mask=m_rows[:, None], other=0)


@triton.jit(do_not_specialize=["M", "blocks"])
def fused_fwd_kernel(
    x,
    packed,
    scale,
    bias,
    y,
    M,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWIGLU: tl.constexpr,
    JOINED: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """y^T = (codes @ x^T) * scale + bias, or partial sums of codes @ x^T in y [splits, M, N].

    With SWIGLU the first half of the weight's rows are gates of the second: y [M, N / 2]. A tile
    then has a gate and its up in turn. Partial sums have the rows in their own order.

    The weights are the left factor: a Hopper instruction always has 64 rows of that one, while the
    other dimension, here the tokens, may be as small as 16. The codes are exact in half precision,
    and the sum is multiplied by the row's scale.
    """
    MASKED: tl.constexpr = K % (2 * BJ) != 0
    dtype: tl.constexpr = x.dtype.element_ty
    i_m, i_n = tile_indices(M, tl.cdiv(N, BN), BM, GROUP)
    i_s = tl.program_id(1)
    # [BM], [BN]
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    if SWIGLU:
        o_n = o_n // 2 + o_n % 2 * (N // 2)
    # [BJ], [2 BJ]
    o_j, o_k = tl.arange(0, BJ), tl.arange(0, 2 * BJ)
    # [BN, BJ], [BM, 2 BJ]
    p_packed = packed + o_n[:, None] * (K // 2) + o_j[None, :]
    p_x = x + o_m[:, None] * K + o_k[None, :]

    # [BN, BM]
    b_y = tl.zeros([BN, BM], dtype=tl.float32)
    for i in range(i_s * blocks, tl.minimum((i_s + 1) * blocks, tl.cdiv(K, 2 * BJ))):
        i_j = i * BJ
        b_packed = load_tile(p_packed + i_j, m_n, i_j + o_j, K // 2, MASKED)
        b_x = load_tile(p_x + 2 * i_j, m_m, 2 * i_j + o_k, K, MASKED)
        # [BN, BJ]
        b_even, b_odd = decode_pair(b_packed, dtype, JOINED)
        if JOINED:
            # [BN, 2 BJ] @ [2 BJ, BM] -> [BN, BM]
            b_codes = tl.join(b_even, b_odd).reshape(BN, 2 * BJ)
            b_y = tl.dot(b_codes, tl.trans(b_x), b_y, input_precision="ieee")
        else:
            # [BM, BJ]
            b_x_even, b_x_odd = tl.split(b_x.reshape(BM, BJ, 2))
            # [BN, BJ] @ [BJ, BM] -> [BN, BM]
            b_y = tl.dot(b_even, tl.trans(b_x_even), b_y, input_precision="ieee")
            b_y = tl.dot(b_odd, tl.trans(b_x_odd), b_y, input_precision="ieee")

    if not SPLIT:
        b_y *= tl.load(scale + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    # [BM, BN]
    b_y = tl.trans(b_y)
    if SWIGLU:
        # [BM, BN / 2]
        b_gate, b_up = tl.split(b_y.reshape(BM, BN // 2, 2))
        o_f = i_n.to(tl.int64) * (BN // 2) + tl.arange(0, BN // 2)
        p_y = y + o_m[:, None] * (N // 2) + o_f[None, :]
        tl.store(p_y, gated(b_gate, b_up), mask=m_m[:, None] & (o_f < N // 2)[None, :])
    else:
        p_y = y + i_s.to(tl.int64) * M * N + o_m[:, None] * N + o_n[None, :]
        tl.store(p_y, b_y, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def scaled(b_codes, b_scale):
    """codes * scale, rounded once to the codes' dtype."""
    if b_scale.dtype == b_codes.dtype:
        return b_codes * b_scale
    else:
        return (b_codes.to(tl.float32) * b_scale.to(tl.float32)).to(b_codes.dtype)


@triton.jit(do_not_specialize=["M", "blocks"])
def fused_bwd_kernel(
    dy,
    packed,
    scale,
    dx,
    M,
    blocks,
    N: tl.constexpr,
    K: tl.constexpr,
    JOINED: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
):
    """dx = dy @ (scale * codes), or partial sums of it in dx [splits, M, K].

    The scales belong to the rows that are summed over, so that they go to one of the factors.
    float16: to the codes, whose product with a scale is a weight of usual size; dy * scale would
    underflow where dy is small. bfloat16 and float32 have the range: to dy, of which a block has
    fewer elements than of weights. Either way one factor is rounded once, as a dequantised weight
    is.
    """
    MASKED: tl.constexpr = N % BN != 0
    dtype: tl.constexpr = dy.dtype.element_ty
    i_m, i_j = tile_indices(M, tl.cdiv(K, 2 * BJ), BM, GROUP)
    i_s = tl.program_id(1)
    # [BM], [BJ], [BN]
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)
    o_j = i_j * BJ + tl.arange(0, BJ)
    o_n = tl.arange(0, BN)
    m_m = o_m < M
    # [BN, BJ], [BM, BN]
    p_packed = packed + o_n[:, None].to(tl.int64) * (K // 2) + o_j[None, :]
    p_dy = dy + o_m[:, None] * N + o_n[None, :]

    if JOINED:
        # [BM, 2 BJ]
        b_dx = tl.zeros([BM, 2 * BJ], dtype=tl.float32)
    else:
        # [BM, BJ]
        b_even = tl.zeros([BM, BJ], dtype=tl.float32)
        b_odd = tl.zeros([BM, BJ], dtype=tl.float32)
    for i in range(i_s * blocks, tl.minimum((i_s + 1) * blocks, tl.cdiv(N, BN))):
        i_n = i * BN
        m_n = i_n + o_n < N
        b_packed = load_tile(
            p_packed + i_n.to(tl.int64) * (K // 2), m_n, o_j, K // 2, K % (2 * BJ) != 0
        )
        b_dy = load_tile(p_dy + i_n, m_m, i_n + o_n, N, MASKED)
        b_scale = tl.load(scale + i_n + o_n, mask=m_n, other=0.0)
        # [BN, BJ]
        b_w_even, b_w_odd = decode_pair(b_packed, dtype, JOINED)
        if dtype == tl.float16:
            b_w_even = scaled(b_w_even, b_scale[:, None])
            b_w_odd = scaled(b_w_odd, b_scale[:, None])
        else:
            b_dy = (b_dy.to(tl.float32) * b_scale.to(tl.float32)[None, :]).to(dtype)
        if JOINED:
            # [BM, BN] @ [BN, 2 BJ] -> [BM, 2 BJ]
            b_w = tl.join(b_w_even, b_w_odd).reshape(BN, 2 * BJ)
            b_dx = tl.dot(b_dy, b_w, b_dx, input_precision="ieee")
        else:
            # [BM, BN] @ [BN, BJ] -> [BM, BJ]
            b_even = tl.dot(b_dy, b_w_even, b_even, input_precision="ieee")
            b_odd = tl.dot(b_dy, b_w_odd, b_odd, input_precision="ieee")

    if not JOINED:
        # [BM, 2 BJ]
        b_dx = tl.join(b_even, b_odd).reshape(BM, 2 * BJ)
    o_k = i_j * (2 * BJ) + tl.arange(0, 2 * BJ)
    p_dx = dx + i_s.to(tl.int64) * M * K + o_m[:, None] * K + o_k[None, :]
    tl.store(p_dx, b_dx, mask=m_m[:, None] & (o_k < K)[None, :])


@triton.jit
def sum_of_splits(partials, scale, bias, o_p, o_n, m_p, size, splits):
    """sum(partials) * scale + bias at offsets o_p, which are of columns o_n."""
    # [BE]
    b_y = tl.zeros(o_p.shape, dtype=tl.float32)
    for i in range(splits):
        b_y += tl.load(partials + i * size + o_p, mask=m_p, other=0.0)
    if scale is not None:
        b_y *= tl.load(scale + o_n, mask=m_p, other=0.0).to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_p, other=0.0).to(tl.float32)
    return b_y


@triton.jit(do_not_specialize=["M", "splits"])
def sum_splits_kernel(
    partials, scale, bias, y, M, splits, N: tl.constexpr, SWIGLU: tl.constexpr, BE: tl.constexpr
):
    """y [M, N] = sum(partials) * scale + bias for partials [splits, M, N]; scale and bias may be
    None. With SWIGLU the first half of a row are gates of the second: y [M, N / 2]."""
    COLUMNS: tl.constexpr = N // 2 if SWIGLU else N
    size = M.to(tl.int64) * N
    # [BE]
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    o_n = o_e % COLUMNS
    m_e = o_e < M.to(tl.int64) * COLUMNS
    o_p = o_e // COLUMNS * N + o_n if SWIGLU else o_e
    b_y = sum_of_splits(partials, scale, bias, o_p, o_n, m_e, size, splits)
    if SWIGLU:
        o_up = o_p + COLUMNS
        b_up = sum_of_splits(partials, scale, bias, o_up, o_n + COLUMNS, m_e, size, splits)
        b_y = gated(b_y, b_up)
    tl.store(y + o_e, b_y, mask=m_e)
