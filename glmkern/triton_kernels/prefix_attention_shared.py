"""What the forward, backward and decode kernels of prefix_attention share.

The query heads of a group are packed: row r of a sequence and a group is head r % HEADS of token
r // HEADS, so that a block of keys is read once for all of them. Blocks are BM rows, BN keys and BC
channels, of which C are there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels import philox
from glmkern.triton_kernels.launch import launch

# Starts of sequences that a program looks at together.
STARTS = tl.constexpr(128)


@triton.jit
def find_tile(cu_seqlens, i_slot, B, ROWS: tl.constexpr, BM):
    """The sequence, its start, its tokens and the tile of it that a slot stands for.

    Sequence b, of ROWS rows a token, begins at slot start_b * ROWS // BM + b: at least as many
    slots lie before the next one's as it has tiles of BM rows, and no other sequence need be known.
    The slots behind its last tile are idle. In all there are T * ROWS // BM + B.
    """
    i_b = tl.full([], -1, dtype=tl.int32)
    for i in range(0, B, STARTS):
        # [STARTS]
        o_b = i + tl.arange(0, STARTS)
        b_start = tl.load(cu_seqlens + o_b, mask=o_b < B, other=0)
        m_before = (b_start * ROWS // BM + o_b <= i_slot) & (o_b < B)
        i_b += tl.sum(m_before.to(tl.int32), 0)
    i_start = tl.load(cu_seqlens + i_b)
    S = tl.load(cu_seqlens + i_b + 1) - i_start
    return i_b, i_start, S, i_slot - (i_start * ROWS // BM + i_b)


@triton.jit
def row_offsets(i_r, STRIDE: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr):
    """Where rows i_r to i_r + BM lie [BM], from the first head of i_r's token on. i_r is a multiple
    of BM away from a token's first head."""
    o_r = tl.arange(0, BM)
    if BM % HEADS != 0:
        o_r += i_r % HEADS
    return o_r // HEADS * STRIDE + o_r % HEADS * C


@triton.jit
def load_rows(x, i_start, i_r, rows, STRIDE: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr,
              BM: tl.constexpr, BC: tl.constexpr):
    """Rows i_r to i_r + BM of x; zeros from row `rows` on. Rows count from token i_start, x points
    to the group's first head of token 0, and tokens are STRIDE apart."""
    o_c = tl.arange(0, BC)
    # [BM, BC]
    o_x = row_offsets(i_r, STRIDE, HEADS, C, BM)[:, None] + o_c[None, :]
    m_x = (i_r + tl.arange(0, BM) < rows)[:, None] & (o_c < C)[None, :]
    return tl.load(x + (i_start + i_r // HEADS).to(tl.int64) * STRIDE + o_x, mask=m_x, other=0.0)


@triton.jit
def store_rows(x, b_x, i_start, i_r, rows, STRIDE: tl.constexpr, HEADS: tl.constexpr,
               C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    o_c = tl.arange(0, BC)
    # [BM, BC]
    o_x = row_offsets(i_r, STRIDE, HEADS, C, BM)[:, None] + o_c[None, :]
    m_x = (i_r + tl.arange(0, BM) < rows)[:, None] & (o_c < C)[None, :]
    tl.store(x + (i_start + i_r // HEADS).to(tl.int64) * STRIDE + o_x, b_x, mask=m_x)


@triton.jit
def load_numbers(x, i_start, i_r, rows, N: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """One number [BM] for each of rows i_r to i_r + BM, from x [tokens, N]."""
    o_x = row_offsets(i_r, N, HEADS, 1, BM)
    return tl.load(x + (i_start + i_r // HEADS).to(tl.int64) * N + o_x,
                   mask=i_r + tl.arange(0, BM) < rows, other=0.0)


@triton.jit
def store_numbers(x, b_x, i_start, i_r, rows, N: tl.constexpr, HEADS: tl.constexpr,
                  BM: tl.constexpr):
    o_x = row_offsets(i_r, N, HEADS, 1, BM)
    tl.store(x + (i_start + i_r // HEADS).to(tl.int64) * N + o_x, b_x,
             mask=i_r + tl.arange(0, BM) < rows)


@triton.jit
def load_keys(x, i_n, end, STRIDE: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
              BC: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values i_n to i_n + BN of one group, STRIDE apart; MASKED: zeros from `end` on."""
    o_c = tl.arange(0, BC)
    # [BN, BC]
    p_x = x + tl.cast(i_n, tl.int64) * STRIDE + (tl.arange(0, BN) * STRIDE)[:, None] + o_c[None, :]
    if MASKED:
        m_x = (i_n + tl.arange(0, BN) < end)[:, None] & (o_c < C)[None, :]
        return tl.load(p_x, mask=m_x, other=0.0)
    if C < BC:
        return tl.load(p_x, mask=(o_c < C)[None, :], other=0.0)
    return tl.load(p_x)


@triton.jit
def attend(b_q, b_out, b_max, b_sum, o_last, k, v, begin, end, scale, K_STRIDE: tl.constexpr,
           V_STRIDE: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
           MASKED: tl.constexpr):
    """Takes keys begin <= n < end into the softmax of rows b_q.

    b_max is the largest of `scale` times the scores so far, b_sum the sum of their exponentials
    relative to it, b_out that sum times the values. MASKED: row i sees key n only if
    n <= o_last[i], and the last block may be short.
    """
    for i_n in range(begin, end, BN):
        b_k = load_keys(k, i_n, end, K_STRIDE, C, BN, BC, MASKED)
        # [BM, BC] @ [BC, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if MASKED:
            o_n = i_n + tl.arange(0, BN)
            m_s = (o_n <= o_last[:, None]) & (o_n < end)[None, :]
            b_s = tl.where(m_s, b_s, float("-inf"))
        # [BM]
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_shift = b_new
        if MASKED:
            # a row that has seen nothing yet: -inf - -inf is not a number
            b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shrink = tl.exp(b_max - b_shift)
        # [BM, BN]
        b_p = tl.exp(b_s - b_shift[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = load_keys(v, i_n, end, V_STRIDE, C, BN, BC, MASKED)
        # [BM, BN] @ [BN, BC] -> [BM, BC]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, acc=b_out * b_shrink[:, None],
                       input_precision="ieee")
        b_max = b_new
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["threshold"])
def drop_prefix_kernel(
    prefix_k,
    prefix_v,
    seed,
    sequence_ids,
    dropped,
    kept,
    threshold,
    factor,
    COUNT: tl.constexpr,
    BE: tl.constexpr,
):
    """dropped [B, 2, COUNT] = keys and values as the dropout of each sequence leaves them, rounded;
    kept, of the same shape, or None, says which elements it kept."""
    i_b = tl.program_id(1)
    i_e = tl.program_id(0) * BE
    # [BE]
    o_e = i_e + tl.arange(0, BE)
    i_id = tl.load(sequence_ids + i_b)
    for i_kv in tl.static_range(2):
        if COUNT % 4 == 0:
            o_g = (i_kv * COUNT + i_e) // 4 + tl.arange(0, BE // 4)
            m_keep = philox.keep_groups(seed, i_id, o_g, threshold)
        else:
            m_keep = philox.keep(seed, i_id, i_kv * COUNT + o_e, threshold)
        x = prefix_k if i_kv == 0 else prefix_v
        b_x = tl.load(x + o_e, mask=o_e < COUNT, other=0.0)
        b_x = b_x.to(dropped.dtype.element_ty).to(tl.float32) * tl.where(m_keep, factor, 0.0)
        o_d = (i_b.to(tl.int64) * 2 + i_kv) * COUNT + o_e
        tl.store(dropped + o_d, b_x, mask=o_e < COUNT)
        if kept is not None:
            tl.store(kept + o_d, m_keep.to(tl.uint8), mask=o_e < COUNT)


class Prefix(NamedTuple):
    """The prefix in q's dtype, as kernels take it: sequence b's keys begin at element b * STRIDE of
    `keys`. `length` 0 and no tensors where there is none."""

    keys: Tensor | None
    values: Tensor | None
    kept: Tensor | None  # uint8, laid out as the keys and, behind them, the values of each sequence
    length: int
    STRIDE: int


def prefix_of(q: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, p: float = 0.0,
              seed: Tensor | None = None, sequence_ids: Tensor | None = None,
              with_kept: bool = False) -> Prefix:
    """Rounds the prefix to q's dtype and drops what each sequence drops.

    Every tile of queries reads it; drawing there would cost several times the products with it. A
    sequence's copy is as large as the prefix: what 2 P G C / H tokens of hidden size H take.
    """
    if prefix_k is None or prefix_k.numel() == 0:
        return Prefix(None, None, None, 0, 0)
    prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    P, count = len(prefix_k), prefix_k.numel()
    if p == 0:
        return Prefix(prefix_k.to(q.dtype), prefix_v.to(q.dtype), None, P, 0)
    B = len(sequence_ids)
    dropped = q.new_empty(B, 2, count)
    kept = q.new_empty(B, 2, count, dtype=torch.uint8) if with_kept else None
    BE = 1024
    launch(drop_prefix_kernel, (triton.cdiv(count, BE), B), prefix_k, prefix_v, seed.contiguous(),
           sequence_ids.contiguous(), dropped, kept, *philox.drop_constants(p),
           COUNT=count, BE=BE, num_warps=4)
    return Prefix(dropped[:, 0], dropped[:, 1], kept, P, 2 * count)


class AttentionTile(NamedTuple):
    """`rows` packed queries by `keys` keys, for at most 128 channels."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def fit_channels(tile: AttentionTile, BC: int) -> AttentionTile:
    """Fewer rows and keys where there are more than 128 channels."""
    shrink = max(BC // 128, 1)
    return tile._replace(rows=max(tile.rows // shrink, 16), keys=max(tile.keys // shrink, 16))


def block_of_channels(C: int) -> int:
    """The power of 2 that holds C channels; a product needs 16 at least."""
    return max(triton.next_power_of_2(C), 16)


def with_dense_heads(x: Tensor) -> Tensor:
    """Heads and channels side by side, tokens at any distance: x itself or, otherwise, a copy."""
    heads, channels = x.shape[-2:]
    dense = x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == channels)
    return x if dense else x.contiguous()
