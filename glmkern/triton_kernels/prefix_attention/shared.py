"""What the forward, backward and decode kernels of prefix_attention share.

The query heads of a group are packed, so that a block of keys is read once for all of them: row r
of a sequence and a group is head r % HEADS of token r // HEADS. Blocks are BM rows, BN keys and BC
channels, of which C are there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels import philox
from glmkern.triton_kernels.launch import contiguous, launch

# Starts of sequences that a program looks at together.
STARTS = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_tile(cu_seqlens, i_slot, B, ROWS: tl.constexpr, BM):
    """The sequence, its start, its tokens and the tile of it that a slot stands for.

    Sequence b, of ROWS rows a token, begins at slot start_b * ROWS // BM + b. Its slots suffice for
    its tiles of BM rows, and no other sequence need be known. The slots after its last tile are
    idle. In all there are T * ROWS // BM + B.
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
def load_rows(
    x,
    i_start,
    i_r,
    rows,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Rows i_r to i_r + BM of x; zeros from row `rows` on. Rows count from token i_start, x points
    to the group's first head of token 0, and tokens are STRIDE apart."""
    o_c = tl.arange(0, BC)
    # [BM, BC]
    o_x = row_offsets(i_r, STRIDE, HEADS, C, BM)[:, None] + o_c[None, :]
    m_x = (i_r + tl.arange(0, BM) < rows)[:, None] & (o_c < C)[None, :]
    return tl.load(x + (i_start + i_r // HEADS).to(tl.int64) * STRIDE + o_x, mask=m_x, other=0.0)


@triton.jit
def store_rows(
    x,
    b_x,
    i_start,
    i_r,
    rows,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    o_c = tl.arange(0, BC)
    # [BM, BC]
    o_x = row_offsets(i_r, STRIDE, HEADS, C, BM)[:, None] + o_c[None, :]
    m_x = (i_r + tl.arange(0, BM) < rows)[:, None] & (o_c < C)[None, :]
    tl.store(x + (i_start + i_r // HEADS).to(tl.int64) * STRIDE + o_x, b_x, mask=m_x)


@triton.jit
def load_numbers(x, i_start, i_r, rows, N: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """One number [BM] for each of rows i_r to i_r + BM, from x [tokens, N]."""
    o_x = row_offsets(i_r, N, HEADS, 1, BM)
    return tl.load(
        x + (i_start + i_r // HEADS).to(tl.int64) * N + o_x,
        mask=i_r + tl.arange(0, BM) < rows,
        other=0.0,
    )


@triton.jit
def store_numbers(
    x, b_x, i_start, i_r, rows, N: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr
):
    o_x = row_offsets(i_r, N, HEADS, 1, BM)
    tl.store(
        x + (i_start + i_r // HEADS).to(tl.int64) * N + o_x, b_x, mask=i_r + tl.arange(0, BM) < rows
    )


@triton.jit
def load_keys(x, i_n, end, stride, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Keys or values i_n to i_n + BN of one group, `stride` apart; zeros from `end` on."""
    o_c = tl.arange(0, BC)
    # [BN, BC]
    p_x = x + tl.cast(i_n, tl.int64) * stride + (tl.arange(0, BN) * stride)[:, None] + o_c[None, :]
    m_x = (tl.arange(0, BN) < end - i_n)[:, None] & (o_c < C)[None, :]
    return tl.load(p_x, mask=m_x, other=0.0)


@triton.jit
def segment_of(i_n, P: tl.constexpr, BN: tl.constexpr):
    """Whether the block from key i_n on is of the prefix, and its first key's place in its segment.
    Keys count from the prefix's first; the sequence's follow its last whole block."""
    ROUNDED: tl.constexpr = (P + BN - 1) // BN * BN
    return i_n < ROUNDED, tl.where(i_n < ROUNDED, i_n, i_n - ROUNDED)


@triton.jit
def load_seen(
    prefix,
    x,
    i_n,
    end,
    P: tl.constexpr,
    PREFIX_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Block i_n (see segment_of) of keys or values: the prefix's, or those of the sequence up to
    `end`, each with its stride; zeros from there on."""
    i_x, stride = i_n, STRIDE
    if P > 0:
        in_prefix, i_x = segment_of(i_n, P, BN)
        end = tl.where(in_prefix, P, end)
        stride = tl.where(in_prefix, PREFIX_STRIDE, STRIDE)
        x = tl.where(in_prefix, prefix, x)
    return load_keys(x, i_x, end, stride, C, BN, BC)


@triton.jit
def hide_unseen(b_x, hidden, o_t, i_n, P: tl.constexpr):
    """b_x [BM, BN] with `hidden` where the row's token, o_t, does not see the key of block i_n."""
    BN: tl.constexpr = b_x.shape[1]
    o_last, i_x = o_t, i_n
    if P > 0:
        in_prefix, i_x = segment_of(i_n, P, BN)
        o_last = tl.where(in_prefix, P - 1, o_t)
    return tl.where(tl.arange(0, BN)[None, :] <= (o_last - i_x)[:, None], b_x, hidden)


@triton.jit
def all_seen(i_t, i_n, P: tl.constexpr, BN: tl.constexpr):
    """Whether token i_t, and so every later one, sees all keys of block i_n."""
    i_x, full = i_n, i_t + 1
    if P > 0:
        in_prefix, i_x = segment_of(i_n, P, BN)
        full = tl.where(in_prefix, P, full)
    return i_x + BN <= full


# Exponents: a score or its log-sum-exp as `power` takes it. Half precision uses powers of 2, whose
# factor goes into that of the scores. An exponential is then one fma and one ex2; tl.exp is five
# instructions more. float32 uses powers of e: rounding lse to another base and back would put the
# error of dq above 3 times PyTorch's.
@triton.jit
def exponent(x, dtype: tl.constexpr):
    if dtype == tl.float32:
        return x
    return x * LOG2_E


@triton.jit
def power(x, dtype: tl.constexpr):
    if dtype == tl.float32:
        return tl.exp(x)
    return tl.exp2(x)


@triton.jit
def update_softmax(b_s, b_max, b_sum, slope, dtype: tl.constexpr):
    """Takes scores b_s [BM, BN] into the softmax of their rows.

    b_max [BM] is the largest of the exponents `slope` * b_s so far, b_sum [BM] the sum of their
    powers relative to it. Returns the new b_max and b_sum, the powers of b_s, and the factor for
    what is relative to the old b_max. One of the two b_max must be above -inf, or their difference
    is no number.
    """
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * slope)
    b_shrink = power(b_max - b_new, dtype)
    b_p = power(b_s * slope - b_new[:, None], dtype)
    return b_new, b_sum * b_shrink + tl.sum(b_p, 1), b_p, b_shrink


@triton.jit
def log_sum_exp(b_max, b_sum, dtype: tl.constexpr):
    """The natural logarithm of b_sum times the power of exponent b_max."""
    if dtype == tl.float32:
        return b_max + tl.log(b_sum)
    return (b_max + tl.log2(b_sum)) / LOG2_E


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
    kept: Tensor | None  # uint8, laid out as the keys and then the values of each sequence
    length: int
    STRIDE: int


def prefix_of(
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    p: float = 0.0,
    seed: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    with_kept: bool = False,
) -> Prefix:
    """Rounds the prefix to q's dtype and drops what each sequence drops.

    Every tile of queries reads it; drawing there would cost several times the products with it. A
    sequence's copy is as large as the prefix: what 2 P G C / H tokens of hidden size H take.
    """
    if prefix_k is None or prefix_k.numel() == 0:
        return Prefix(None, None, None, 0, 0)
    prefix_k, prefix_v = contiguous(prefix_k, prefix_v)
    P, count = len(prefix_k), prefix_k.numel()
    if p == 0:
        return Prefix(prefix_k.to(q.dtype), prefix_v.to(q.dtype), None, P, 0)
    B = len(sequence_ids)
    dropped = q.new_empty(B, 2, count)
    kept = q.new_empty(B, 2, count, dtype=torch.uint8) if with_kept else None
    BE = 1024
    launch(
        drop_prefix_kernel,
        (triton.cdiv(count, BE), B),
        prefix_k,
        prefix_v,
        seed.contiguous(),
        sequence_ids.contiguous(),
        dropped,
        kept,
        *philox.drop_constants(p),
        COUNT=count,
        BE=BE,
        num_warps=4,
    )
    return Prefix(dropped[:, 0], dropped[:, 1], kept, P, 2 * count)


class AttentionTile(NamedTuple):
    """`rows` packed queries by `keys` keys, for at most 128 channels; `late` is the forward's LATE,
    for chips whose products run beside other instructions (sm_90, sm_100)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    late: bool = False


def fit_channels(tile: AttentionTile, BC: int) -> AttentionTile:
    """Fewer rows and keys where there are more than 128 channels."""
    shrink = max(BC // 128, 1)
    return tile._replace(rows=max(tile.rows // shrink, 16), keys=max(tile.keys // shrink, 16))


def block_of_channels(C: int) -> int:
    """The power of 2 that holds C channels; a product needs 16 at least."""
    return max(triton.next_power_of_2(C), 16)


def with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with scale > 0: a row's largest is then `scale` times its largest product,
    and a product that a mask made -inf stays so."""
    if scale > 0:
        return q, scale
    return (torch.zeros_like(q), 1.0) if scale == 0 else (-q, -scale)


def with_dense_heads(x: Tensor) -> Tensor:
    """Heads and channels side by side, tokens at any distance: x itself or, otherwise, a copy."""
    heads, channels = x.shape[-2:]
    dense = x.stride(-1) == 1 and (heads == 1 or x.stride(-2) == channels)
    return x if dense else x.contiguous()
