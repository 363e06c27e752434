"""The forward of prefix_attention: flash attention (Dao, 2023) with the prefix as one more segment
of keys, which every sequence reads from the same place.

A program owns BM packed rows of one sequence and group (shared.py). One loop walks the blocks of
the prefix and of the sequence: a second loop would wait again for its first blocks from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import launch
from glmkern.triton_kernels.prefix_attention.shared import (
    AttentionTile,
    all_seen,
    block_of_channels,
    exponent,
    find_tile,
    fit_channels,
    hide_unseen,
    load_rows,
    load_seen,
    log_sum_exp,
    prefix_of,
    store_numbers,
    store_rows,
    update_softmax,
    with_dense_heads,
    with_positive_scale,
)
from glmkern.triton_kernels.tiles import by_shared_memory

# By KiB of shared memory, then by bytes of an element. Products of float32 run without tensor
# cores, one multiply-add at a time, and keep both operands in registers.
TILES = {
    64: {2: AttentionTile(64, 32, 4, 1), 4: AttentionTile(32, 32, 8, 1)},
    99: {2: AttentionTile(128, 32, 8, 3), 4: AttentionTile(32, 32, 8, 1)},
    163: {2: AttentionTile(128, 64, 8, 3), 4: AttentionTile(32, 32, 8, 1)},
    227: {2: AttentionTile(128, 64, 8, 3, late=True), 4: AttentionTile(32, 32, 8, 1)},
}


@triton.jit
def add_values(
    b_out,
    b_shrink,
    b_p,
    prefix_v,
    v,
    i_n,
    end,
    P: tl.constexpr,
    PREFIX_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    """b_out [BM, BC] times b_shrink [BM], and the values of block i_n weighted by b_p [BM, BN]."""
    b_v = load_seen(prefix_v, v, i_n, end, P, PREFIX_STRIDE, V_STRIDE, C, b_p.shape[1], BC)
    # [BM, BN] @ [BN, BC] -> [BM, BC]
    return tl.dot(b_p.to(b_v.dtype), b_v, acc=b_out * b_shrink[:, None], input_precision="ieee")


@triton.jit(do_not_specialize=["B"])
def prefix_attention_fwd_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    cu_seqlens,
    out,
    lse,
    B,
    scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    PREFIX_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    LATE: tl.constexpr,
):
    """out = softmax(scale * q k^T) v over prefix and tokens, lse the natural log of the sum.

    LATE: a block's product with the values starts after the scores of the next block. Tensor cores
    then work during the softmax (Shah et al., FlashAttention-3, 2024).
    """
    N: tl.constexpr = G * HEADS
    # A sequence's last tiles see the most keys; they start first.
    i_slot = tl.num_programs(0) - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    i_b, i_start, S, i_tile = find_tile(cu_seqlens, i_slot, B, HEADS, BM)
    i_r = i_tile * BM
    rows = S * HEADS
    if i_r >= rows:
        return

    b_q = load_rows(q + i_g * HEADS * C, i_start, i_r, rows, Q_STRIDE, HEADS, C, BM, BC)
    # [BM]
    o_t = (i_r + tl.arange(0, BM)) // HEADS
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_shrink = tl.full([BM], 1.0, dtype=tl.float32)
    # [BM, BN]
    b_p = tl.zeros([BM, BN], dtype=tl.float32)
    # [BM, BC]
    b_out = tl.zeros([BM, BC], dtype=tl.float32)

    if P > 0:
        o_p = i_b.to(tl.int64) * PREFIX_STRIDE + i_g * C
        prefix_k += o_p
        prefix_v += o_p
    k += i_start.to(tl.int64) * K_STRIDE + i_g * C
    v += i_start.to(tl.int64) * V_STRIDE + i_g * C
    slope = exponent(scale, b_q.dtype)
    # no row sees later keys than the last row
    end = tl.minimum((i_r + BM - 1) // HEADS + 1, S)
    blocks = tl.cdiv(P, BN) + tl.cdiv(end, BN)
    for i in range(blocks):
        i_n = i * BN
        b_k = load_seen(prefix_k, k, i_n, end, P, G * C, K_STRIDE, C, BN, BC)
        # [BM, BC] @ [BC, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if LATE:
            # of the block before; b_p is 0 in the beginning
            b_out = add_values(
                b_out,
                b_shrink,
                b_p,
                prefix_v,
                v,
                tl.maximum(i_n - BN, 0),
                end,
                P,
                G * C,
                V_STRIDE,
                C,
                BC,
            )
        # A branch around it would give mma.sync's scores a layout that the product with the values
        # cannot use.
        if not LATE:
            b_s = hide_unseen(b_s, float("-inf"), o_t, i_n, P)
        elif not all_seen(i_r // HEADS, i_n, P, BN):
            b_s = hide_unseen(b_s, float("-inf"), o_t, i_n, P)
        # every row sees a key of the first block
        b_max, b_sum, b_p, b_shrink = update_softmax(b_s, b_max, b_sum, slope, b_q.dtype)
        if not LATE:
            b_out = add_values(
                b_out, b_shrink, b_p, prefix_v, v, i_n, end, P, G * C, V_STRIDE, C, BC
            )
    if LATE:
        b_out = add_values(
            b_out, b_shrink, b_p, prefix_v, v, (blocks - 1) * BN, end, P, G * C, V_STRIDE, C, BC
        )

    store_rows(
        out + i_g * HEADS * C, b_out / b_sum[:, None], i_start, i_r, rows, N * C, HEADS, C, BM, BC
    )
    store_numbers(
        lse + i_g * HEADS, log_sum_exp(b_max, b_sum, b_q.dtype), i_start, i_r, rows, N, HEADS, BM
    )


def prefix_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    T, N, C = q.shape
    G = k.shape[1]
    q, scale = with_positive_scale(q, scale)
    q, k, v = (with_dense_heads(x) for x in (q, k, v))
    prefix = prefix_of(q, prefix_k, prefix_v, p, seed, sequence_ids)
    out = q.new_empty(q.shape)
    lse = q.new_empty(T, N, dtype=torch.float32)
    B, HEADS, BC = len(cu_seqlens) - 1, N // G, block_of_channels(C)
    tile = fit_channels(by_shared_memory(TILES, q.device)[q.element_size()], BC)
    launch(
        prefix_attention_fwd_kernel,
        (T * HEADS // tile.rows + B, G),
        q,
        k,
        v,
        prefix.keys,
        prefix.values,
        cu_seqlens.contiguous(),
        out,
        lse,
        B,
        scale,
        G=G,
        HEADS=HEADS,
        C=C,
        P=prefix.length,
        Q_STRIDE=q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        PREFIX_STRIDE=prefix.STRIDE,
        BM=tile.rows,
        BN=tile.keys,
        BC=BC,
        LATE=tile.late,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse
