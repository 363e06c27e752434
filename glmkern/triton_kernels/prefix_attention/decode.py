"""Attention of a few new tokens over a long cache; the formulas are in
glmkern/ops/prefix_attention.py.

Decoding has too few query rows to fill a GPU, so the keys, the prefix's first, are divided among
programs (flash-decoding; Dao et al., 2023). A second kernel combines their results. The division
depends on the size of the cache and of the queries alone: a row's result is the same whatever else
is in the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import launch
from glmkern.triton_kernels.prefix_attention.shared import (
    AttentionTile,
    block_of_channels,
    exponent,
    fit_channels,
    hide_unseen,
    load_keys,
    load_rows,
    log_sum_exp,
    prefix_of,
    store_numbers,
    store_rows,
    update_softmax,
    with_dense_heads,
    with_positive_scale,
)
from glmkern.triton_kernels.tiles import by_shared_memory

# By KiB of shared memory, then by bytes of an element. `rows` is the most: where fewer are packed,
# as in decoding one token, a tile has fewer. Two blocks share a multiprocessor.
TILES = {
    64: {2: AttentionTile(64, 32, 4, 2), 4: AttentionTile(16, 16, 4, 2)},
    99: {2: AttentionTile(64, 32, 4, 2), 4: AttentionTile(16, 16, 4, 2)},
    163: {2: AttentionTile(64, 64, 4, 2), 4: AttentionTile(16, 32, 4, 1)},
    227: {2: AttentionTile(64, 64, 4, 2), 4: AttentionTile(16, 32, 4, 1)},
}
# Keys of a program: enough that reading them outweighs writing its partial result. Keys and values
# in half precision take 64 KiB; the result, 16 rows of 128 in float32, takes 8.
KEYS_OF_A_SPLIT = 128
# The most programs that share a row. Prompts have tiles enough of their own.
SPLITS = 64
COMBINED_ROWS = 4
# A row that has seen no key; with -inf, the difference of two would not be a number.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def attend(
    b_q,
    b_out,
    b_max,
    b_sum,
    o_last,
    k,
    v,
    begin,
    end,
    scale,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Takes keys begin <= n < end into the softmax of rows b_q; `scale` is above 0.

    b_max and b_sum are those of update_softmax, b_out is that sum times the values. Row i sees key
    n only if n <= o_last[i], which is less than `end`.
    """
    slope = exponent(scale, b_q.dtype)
    for i_n in range(begin, end, BN):
        b_k = load_keys(k, i_n, end, K_STRIDE, C, BN, BC)
        # [BM, BC] @ [BC, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = hide_unseen(b_s, float("-inf"), o_last, i_n, 0)
        b_max, b_sum, b_p, b_shrink = update_softmax(b_s, b_max, b_sum, slope, b_q.dtype)
        b_v = load_keys(v, i_n, end, V_STRIDE, C, BN, BC)
        # [BM, BN] @ [BN, BC] -> [BM, BC]
        b_out = tl.dot(
            b_p.to(b_v.dtype), b_v, acc=b_out * b_shrink[:, None], input_precision="ieee"
        )
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["S", "L", "span"])
def prefix_attention_decode_kernel(
    q,
    k_cache,
    v_cache,
    cache_lens,
    prefix_k,
    prefix_v,
    q_lens,
    out,
    lse,
    S,
    L,
    span,
    k_batch_stride,
    v_batch_stride,
    scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """BM rows of a sequence over `span` of its keys, counted from the prefix's first.

    With lse [splits, B, S, N], out [splits, B, S, N, C] is a partial result. lse is then the log of
    its sum, -inf where a row saw no key. Without lse, out is the result. Rows without keys are 0.
    """
    N: tl.constexpr = G * HEADS
    i_r = tl.program_id(0) * BM
    i_split = tl.program_id(1)
    i_b = tl.program_id(2) // G
    i_g = tl.program_id(2) % G
    i_h = i_g * HEADS
    length = tl.minimum(tl.load(cache_lens + i_b), L).to(tl.int32)
    new = tl.minimum(tl.load(q_lens + i_b), S).to(tl.int32)
    # keys begin to end, of which P + n is entry n of the cache; none where no row is valid
    begin = i_split * span
    end = tl.minimum(begin + span, P + length)
    end = tl.where(i_r < new * HEADS, end, 0)

    i_start = i_b * S
    b_q = load_rows(q + i_h * C, i_start, i_r, new * HEADS, N * C, HEADS, C, BM, BC)
    # [BM]
    o_t = (i_r + tl.arange(0, BM)) // HEADS
    b_max = tl.full([BM], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    # [BM, BC]
    b_out = tl.zeros([BM, BC], dtype=tl.float32)

    if P > 0:
        o_last = tl.where(o_t < new, tl.minimum(end, P) - 1, -1)
        b_out, b_max, b_sum = attend(
            b_q,
            b_out,
            b_max,
            b_sum,
            o_last,
            prefix_k + i_g * C,
            prefix_v + i_g * C,
            begin,
            tl.minimum(end, P),
            scale,
            G * C,
            G * C,
            C,
            BN,
            BC,
        )
    # the last of the new tokens sees the whole cache
    o_last = tl.where(o_t < new, tl.minimum(length - new + o_t, end - P - 1), -1)
    k_cache += i_b.to(tl.int64) * k_batch_stride + i_g * C
    v_cache += i_b.to(tl.int64) * v_batch_stride + i_g * C
    b_out, b_max, b_sum = attend(
        b_q,
        b_out,
        b_max,
        b_sum,
        o_last,
        k_cache,
        v_cache,
        tl.maximum(begin, P) - P,
        end - P,
        scale,
        K_STRIDE,
        V_STRIDE,
        C,
        BN,
        BC,
    )

    m_seen = b_sum > 0
    b_sum = tl.where(m_seen, b_sum, 1.0)
    rows = S * HEADS
    if lse is not None:
        i_start += i_split * (tl.num_programs(2) // G) * S
        b_lse = tl.where(m_seen, log_sum_exp(b_max, b_sum, b_q.dtype), float("-inf"))
        store_numbers(lse + i_h, b_lse, i_start, i_r, rows, N, HEADS, BM)
    store_rows(out + i_h * C, b_out / b_sum[:, None], i_start, i_r, rows, N * C, HEADS, C, BM, BC)


@triton.jit(do_not_specialize=["rows", "splits"])
def prefix_attention_decode_combine_kernel(
    partials, lse, out, rows, splits, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """out [rows, C], the mean of partials [splits, rows, C] weighted by the exponentials of lse;
    zero where all are -inf."""
    # [BM]
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    # [BC]
    o_c = tl.arange(0, BC)
    # [BM, BC]
    o_out = o_m[:, None] * C + o_c[None, :]
    m_out = (o_m < rows)[:, None] & (o_c < C)[None, :]
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    for i in range(splits):
        p_lse = lse + tl.cast(i, tl.int64) * rows + o_m
        b_max = tl.maximum(b_max, tl.load(p_lse, mask=o_m < rows, other=float("-inf")))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)

    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_out = tl.zeros([BM, BC], dtype=tl.float32)
    for i in range(splits):
        i_rows = tl.cast(i, tl.int64) * rows
        b_weight = tl.load(lse + i_rows + o_m, mask=o_m < rows, other=float("-inf"))
        b_weight = tl.exp(b_weight - b_shift)
        b_sum += b_weight
        b_out += tl.load(partials + i_rows * C + o_out, mask=m_out, other=0.0) * b_weight[:, None]
    b_out /= tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    tl.store(out + o_out, b_out, mask=m_out)


def prefix_attention_decode_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    q_lens: Tensor,
    scale: float,
) -> Tensor:
    B, S, N, C = q.shape
    L, G = k_cache.shape[1:3]
    q, scale = with_positive_scale(q.contiguous(), scale)
    k_cache, v_cache = with_dense_heads(k_cache), with_dense_heads(v_cache)
    prefix = prefix_of(q, prefix_k, prefix_v)
    HEADS, BC, keys = N // G, block_of_channels(C), prefix.length + L
    tile = fit_channels(by_shared_memory(TILES, q.device)[q.element_size()], BC)
    BM = min(tile.rows, block_of_channels(S * HEADS))
    tiles = triton.cdiv(S * HEADS, BM)
    splits = max(min(triton.cdiv(keys, KEYS_OF_A_SPLIT), SPLITS // max(tiles, 1)), 1)
    span = triton.cdiv(triton.cdiv(keys, splits), tile.keys) * tile.keys

    out, lse = q.new_empty(q.shape), None
    results = out
    if splits > 1:
        results = q.new_empty(splits, *q.shape, dtype=torch.float32)
        lse = q.new_empty(splits, B, S, N, dtype=torch.float32)
    launch(
        prefix_attention_decode_kernel,
        (tiles, splits, B * G),
        q,
        k_cache,
        v_cache,
        cache_lens.contiguous(),
        prefix.keys,
        prefix.values,
        q_lens.contiguous(),
        results,
        lse,
        S,
        L,
        span,
        k_cache.stride(0),
        v_cache.stride(0),
        scale,
        G=G,
        HEADS=HEADS,
        C=C,
        P=prefix.length,
        K_STRIDE=k_cache.stride(1),
        V_STRIDE=v_cache.stride(1),
        BM=BM,
        BN=tile.keys,
        BC=BC,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        launch(
            prefix_attention_decode_combine_kernel,
            triton.cdiv(B * S * N, COMBINED_ROWS),
            results,
            lse,
            out,
            B * S * N,
            splits,
            C=C,
            BM=COMBINED_ROWS,
            BC=BC,
            num_warps=4,
        )
    return out
