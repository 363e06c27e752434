"""Attention over a shared prefix and packed causal sequences; the formulas are in
glmkern/ops/prefix_attention.py.

The forward is flash attention (Dao, 2023) with the prefix as one more segment of keys, which every
sequence reads from the same place: first the prefix, then the keys before the tile's first token,
without a mask, then the few blocks on the diagonal. A program owns BM packed rows of one sequence
and group (prefix_attention_shared.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.ops.sequences import spans, values_are_checked
from glmkern.triton_kernels.launch import launch
from glmkern.triton_kernels.prefix_attention_bwd import prefix_attention_bwd
from glmkern.triton_kernels.prefix_attention_decode import prefix_attention_decode_fwd
from glmkern.triton_kernels.prefix_attention_shared import (
    AttentionTile,
    attend,
    block_of_channels,
    find_tile,
    fit_channels,
    load_rows,
    prefix_of,
    store_numbers,
    store_rows,
    with_dense_heads,
)
from glmkern.triton_kernels.tiles import by_shared_memory

__all__ = ["prefix_attention_fwd", "prefix_attention_bwd", "prefix_attention_decode_fwd"]

# By KiB of shared memory, then by bytes of an element. Products of float32 run without tensor
# cores, one multiply-add at a time, and keep both operands in registers.
TILES = {
    64: {2: AttentionTile(64, 32, 4, 1), 4: AttentionTile(32, 32, 8, 1)},
    99: {2: AttentionTile(128, 32, 8, 3), 4: AttentionTile(32, 32, 8, 1)},
    163: {2: AttentionTile(128, 64, 8, 3), 4: AttentionTile(32, 32, 8, 1)},
    227: {2: AttentionTile(128, 64, 8, 3), 4: AttentionTile(32, 32, 8, 1)},
}


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
):
    """out = softmax(scale * q k^T) v over prefix and tokens, lse the natural log of the sum."""
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
    # [BM, BC]
    b_out = tl.zeros([BM, BC], dtype=tl.float32)

    if P > 0:
        o_p = i_b.to(tl.int64) * PREFIX_STRIDE + i_g * C
        o_last = tl.full([BM], P, dtype=tl.int32)
        b_out, b_max, b_sum = attend(b_q, b_out, b_max, b_sum, o_last, prefix_k + o_p,
                                     prefix_v + o_p, 0, P, scale, G * C, G * C, C, BN, BC,
                                     P % BN != 0)
    k += i_start.to(tl.int64) * K_STRIDE + i_g * C
    v += i_start.to(tl.int64) * V_STRIDE + i_g * C
    # every row sees the keys up to its tile's first token, no row those behind the last
    middle = (i_r // HEADS + 1) // BN * BN
    end = tl.minimum((i_r + BM - 1) // HEADS + 1, S)
    b_out, b_max, b_sum = attend(b_q, b_out, b_max, b_sum, o_t, k, v, 0, middle, scale,
                                 K_STRIDE, V_STRIDE, C, BN, BC, False)
    b_out, b_max, b_sum = attend(b_q, b_out, b_max, b_sum, o_t, k, v, middle, end, scale,
                                 K_STRIDE, V_STRIDE, C, BN, BC, True)

    store_rows(out + i_g * HEADS * C, b_out / b_sum[:, None], i_start, i_r, rows, N * C, HEADS, C,
               BM, BC)
    store_numbers(lse + i_g * HEADS, b_max + tl.log(b_sum), i_start, i_r, rows, N, HEADS,
                  BM)


def prefix_attention_fwd(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None,
                         prefix_v: Tensor | None, cu_seqlens: Tensor, sequence_ids: Tensor,
                         seed: Tensor | None, scale: float, p: float) -> tuple[Tensor, Tensor]:
    T, N, C = q.shape
    G = k.shape[1]
    if values_are_checked(q):
        spans("prefix_attention", cu_seqlens, T)
    q, k, v = (with_dense_heads(x) for x in (q, k, v))
    prefix = prefix_of(q, prefix_k, prefix_v, p, seed, sequence_ids)
    out = q.new_empty(q.shape)
    lse = q.new_empty(T, N, dtype=torch.float32)
    B, HEADS, BC = len(cu_seqlens) - 1, N // G, block_of_channels(C)
    tile = fit_channels(by_shared_memory(TILES, q.device)[q.element_size()], BC)
    launch(prefix_attention_fwd_kernel, (T * HEADS // tile.rows + B, G), q, k, v, prefix.keys,
           prefix.values, cu_seqlens.contiguous(), out, lse, B, scale,
           G=G, HEADS=HEADS, C=C, P=prefix.length, Q_STRIDE=q.stride(0), K_STRIDE=k.stride(0),
           V_STRIDE=v.stride(0), PREFIX_STRIDE=prefix.STRIDE, BM=tile.rows, BN=tile.keys, BC=BC,
           num_warps=tile.num_warps, num_stages=tile.num_stages)
    return out, lse
