"""The gradients of the prefix's keys and values of prefix_attention.

A program owns BN keys of one group, as in dkv.py, and walks the packed rows of the whole batch:
every token sees the whole prefix, and nothing is stored per sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels import philox
from glmkern.triton_kernels.launch import launch
from glmkern.triton_kernels.prefix_attention.dkv import (
    KEYS_OF_A_PROGRAM,
    add_dkv,
    add_splits,
    dkv_tile,
    row_splits,
    split_sums,
)
from glmkern.triton_kernels.prefix_attention.shared import Prefix, find_tile, load_keys, store_rows


@triton.jit(do_not_specialize=["T", "B", "tiles"])
def prefix_attention_bwd_dprefix_kernel(
    dout,
    q,
    prefix_k,
    prefix_v,
    kept,
    lse,
    delta,
    cu_seqlens,
    dk,
    dv,
    T,
    B,
    tiles,
    scale,
    factor,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    DO_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    PREFIX_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """dk and dv of the prefix [splits, P, G, C], each split the sum over `tiles` tiles of BM
    rows.

    Where nothing is dropped, the batch is one run of rows. With `kept`, each sequence has its own
    prefix and a split has rows of one sequence. Its sums count `factor` times where the sequence
    kept the element.
    """
    N: tl.constexpr = G * HEADS
    i_n = tl.program_id(0) * BN
    i_g = tl.program_id(1)
    i_split = tl.program_id(2)
    i_h = i_g * HEADS
    i_start, S, i_tile = tl.zeros([], dtype=tl.int32), T, i_split
    o_p = i_g * C
    if kept is not None:
        i_b, i_start, S, i_tile = find_tile(cu_seqlens, i_split, B, HEADS, tiles * BM)
        o_p += i_b.to(tl.int64) * PREFIX_STRIDE
    # multiples of BM, as the compiler sees, so that it reads lse and delta in wide words
    begin = i_tile * tiles * BM
    rows = S * HEADS
    end = tl.minimum(begin + tiles * BM, rows)

    # [BN, BC]
    b_k = load_keys(prefix_k + o_p, i_n, P, G * C, C, BN, BC)
    b_v = load_keys(prefix_v + o_p, i_n, P, G * C, C, BN, BC)
    b_dk = tl.zeros([BN, BC], dtype=tl.float32)
    b_dv = tl.zeros([BN, BC], dtype=tl.float32)
    b_dk, b_dv = add_dkv(
        b_dk,
        b_dv,
        b_k,
        b_v,
        q + i_h * C,
        dout + i_h * C,
        lse + i_h,
        delta + i_h,
        i_start,
        0,
        begin,
        end,
        rows,
        scale,
        DO_STRIDE,
        Q_STRIDE,
        N,
        HEADS,
        C,
        BM,
        BN,
        BC,
        False,
    )
    if kept is not None:
        b_kept = load_keys(kept + o_p, i_n, P, G * C, C, BN, BC)
        b_dk *= tl.where(b_kept != 0, factor, 0.0)
        b_kept = load_keys(kept + o_p + P * G * C, i_n, P, G * C, C, BN, BC)
        b_dv *= tl.where(b_kept != 0, factor, 0.0)

    o_split = i_split.to(tl.int64) * P * G * C + i_g * C
    i_zero = tl.zeros([], dtype=tl.int32)
    store_rows(dk + o_split, b_dk * scale, i_zero, i_n, P, G * C, 1, C, BN, BC)
    store_rows(dv + o_split, b_dv, i_zero, i_n, P, G * C, 1, C, BN, BC)


def prefix_gradients(
    dout: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix: Prefix,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """dk and dv [P, G, C] of the prefix, in its own dtype; `prefix` is what the queries saw."""
    (T, N, C), (P, G, _), B = q.shape, prefix_k.shape, len(cu_seqlens) - 1
    dk, dv = prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape)
    HEADS = N // G
    tile, BC = dkv_tile(q)
    splits = row_splits(G * triton.cdiv(P, KEYS_OF_A_PROGRAM), T * HEADS)
    tiles = triton.cdiv(triton.cdiv(T * HEADS, splits), tile.rows)
    if prefix.kept is not None:
        splits = T * HEADS // (tiles * tile.rows) + B
    sums = split_sums(dk, dv, splits)
    launch(
        prefix_attention_bwd_dprefix_kernel,
        (triton.cdiv(P, tile.keys), G, splits),
        dout,
        q,
        prefix.keys,
        prefix.values,
        prefix.kept,
        lse,
        delta,
        cu_seqlens,
        *sums,
        T,
        B,
        tiles,
        scale,
        philox.drop_constants(p)[1],
        G=G,
        HEADS=HEADS,
        C=C,
        P=P,
        DO_STRIDE=dout.stride(0),
        Q_STRIDE=q.stride(0),
        PREFIX_STRIDE=prefix.STRIDE,
        BM=tile.rows,
        BN=tile.keys,
        BC=BC,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    add_splits(sums, dk, dv, splits)
    return dk, dv
