"""Products of up to eight tokens with weights of 4 or 8 bits, without tensor cores.

Every weight is loaded once, in words of four bytes, four of them a thread at one or two tokens; in
words of one byte where rows are not whole words. A thread keeps the sums of its own words in fp32,
and they are added up at the end.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from glmkern.triton_kernels.quant_linear.decode import decode_field
from glmkern.triton_kernels.swiglu import gated

MAX_TOKENS = 8


class GemvTile(NamedTuple):
    """`rows` of the weight by `words` of each, by four warps."""

    rows: int
    words: int


# By tokens. A single token's words are no more than threads, so that each thread loads what it
# needs of x. Its loop loads, waits and computes: wide blocks take few turns, and low ones make
# programs enough to keep a large chip's memory busy at 4,096 rows. More tokens go through shared
# memory, and get fewer words, for 16 to 64 accumulators.
FWD_TILES = {1: GemvTile(8, 128), 2: GemvTile(16, 64), 4: GemvTile(32, 32), 8: GemvTile(32, 16)}
BWD_TILES = {1: GemvTile(16, 32), 2: GemvTile(8, 32), 4: GemvTile(4, 32), 8: GemvTile(4, 32)}


@triton.jit
def load_words(words, o_n, o_w, m_n, W: tl.constexpr):
    """Words o_w [1, 1, BW] of the rows o_n [1, BN, 1] that exist."""
    # [1, BN, BW]
    return tl.load(words + o_n * W + o_w, mask=m_n & (o_w < W), other=0).to(tl.int32)


@triton.jit
def finished(b_sum, scale, bias, o_n, m_n):
    """Sums [BM, BN, BW] of a thread's words each, to results of rows o_n [BN]."""
    # [BM, BN]
    b_y = tl.sum(b_sum, 2) * tl.load(scale + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_y


@triton.jit(do_not_specialize=["M"])
def gemv_fwd_kernel(
    x,
    words,
    scale,
    bias,
    y,
    M,
    N: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    SWIGLU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """y [M, N] = (x @ codes^T) * scale + bias for weights of N rows of W words of CODES columns.
    With SWIGLU the first half of these are gates of the second: y [M, N / 2] = silu(gate) * up."""
    ROWS: tl.constexpr = N // 2 if SWIGLU else N
    # [BM, 1, 1], [1, BN, 1]
    o_m = tl.arange(0, BM)[:, None, None]
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[None, :, None]
    # [BM, BN, BW]
    b_sum = tl.zeros([BM, BN, BW], dtype=tl.float32)
    b_up = tl.zeros([BM, BN, BW], dtype=tl.float32)
    for i_w in range(0, W, BW):
        # [1, 1, BW]
        o_w = i_w + tl.arange(0, BW)[None, None, :]
        b_words = load_words(words, o_n, o_w, o_n < ROWS, W)
        if SWIGLU:
            b_words_up = load_words(words, o_n + ROWS, o_w, o_n < ROWS, W)
        # [BM, 1, BW]
        p_x = x + o_m * (W * CODES) + o_w * CODES
        m_x = (o_m < M) & (o_w < W)
        for i in tl.static_range(CODES):
            b_x = tl.load(p_x + i, mask=m_x, other=0.0).to(tl.float32)
            # of 4 bits, an even column has the high half of its byte
            b_sum += decode_field(b_words, (i ^ 1) * 4 if BITS == 4 else i * 8, BITS) * b_x
            if SWIGLU:
                b_up += decode_field(b_words_up, (i ^ 1) * 4 if BITS == 4 else i * 8, BITS) * b_x
    # [BM], [BN]
    o_m = tl.arange(0, BM)
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < ROWS
    b_y = finished(b_sum, scale, bias, o_n, m_n)
    if SWIGLU:
        b_y = gated(b_y, finished(b_up, scale, bias, o_n + ROWS, m_n))
    tl.store(y + o_m[:, None] * ROWS + o_n[None, :], b_y, mask=(o_m < M)[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["M", "blocks"])
def gemv_bwd_kernel(
    dy,
    words,
    scale,
    dx,
    M,
    blocks,
    N: tl.constexpr,
    W: tl.constexpr,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """dx = (dy * scale) @ codes, or partial sums of it in dx [splits, M, columns], each over
    `blocks` blocks of rows."""
    K: tl.constexpr = W * CODES
    i_w, i_s = tl.program_id(0), tl.program_id(1)
    # [BM], [BW], [CODES]
    o_m = tl.arange(0, BM)
    o_w = i_w * BW + tl.arange(0, BW)
    o_shift = tl.arange(0, CODES) * BITS
    if BITS == 4:
        o_shift = o_shift ^ 4
    # [BM, BN, BW, CODES]
    b_sum = tl.zeros([BM, BN, BW, CODES], dtype=tl.float32)
    for i in range(i_s * blocks, tl.minimum((i_s + 1) * blocks, tl.cdiv(N, BN))):
        # [BN]
        o_n = (i * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        # [BN, BW], [BM, BN]
        b_words = tl.load(
            words + o_n[:, None] * W + o_w[None, :], mask=m_n[:, None] & (o_w < W)[None, :], other=0
        ).to(tl.int32)
        b_dy = tl.load(
            dy + o_m[:, None] * N + o_n[None, :], mask=(o_m < M)[:, None] & m_n[None, :], other=0.0
        ).to(tl.float32)
        b_dy *= tl.load(scale + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        # [BN, BW, CODES]
        b_codes = decode_field(b_words[:, :, None] >> o_shift[None, None, :], 0, BITS)
        b_sum += b_dy[:, :, None, None] * b_codes[None, :, :, :]
    # [BM, CODES BW]
    b_dx = tl.sum(b_sum, 1).reshape(BM, BW * CODES)
    o_k = i_w * (BW * CODES) + tl.arange(0, BW * CODES)
    p_dx = dx + (i_s.to(tl.int64) * M + o_m[:, None]) * K + o_k[None, :]
    tl.store(p_dx, b_dx, mask=(o_m < M)[:, None] & (o_k < K)[None, :])
