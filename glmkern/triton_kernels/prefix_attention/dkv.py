"""The gradients of keys and values of prefix_attention: those of the tokens, and what dprefix.py
shares with them.

A program owns BN keys of one group and walks the packed rows that see them: for a token's keys,
the rows of its sequence from that token on. Where keys are few, several programs share the rows of
a block. Each writes its own sums, and these are added in a fixed order: no atomics, the same bits
on every run.
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
    find_tile,
    fit_channels,
    load_keys,
    load_numbers,
    load_rows,
    power,
    store_rows,
)
from glmkern.triton_kernels.tiles import by_shared_memory

# By KiB of shared memory, then by bytes of an element.
TILES = {
    64: {2: AttentionTile(32, 64, 8, 1), 4: AttentionTile(16, 16, 4, 1)},
    99: {2: AttentionTile(64, 64, 8, 1), 4: AttentionTile(16, 16, 4, 1)},
    163: {2: AttentionTile(32, 64, 4, 2), 4: AttentionTile(16, 16, 4, 1)},
    227: {2: AttentionTile(64, 128, 8, 2), 4: AttentionTile(16, 16, 4, 1)},
}
# Programs to aim at: two for each of the 132 multiprocessors of a large chip, but with rows enough
# to outweigh the sums they write. All three are fixed, so that the sums do not depend on the chip's
# number of multiprocessors.
PROGRAMS = 264
ROWS_OF_A_SPLIT = 256
KEYS_OF_A_PROGRAM = 64


@triton.jit
def add_dkv(
    b_dk,
    b_dv,
    b_k,
    b_v,
    q,
    dout,
    lse,
    delta,
    i_start,
    i_n,
    begin,
    end,
    rows,
    scale,
    DO_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """b_dk + dS^T q and b_dv + P^T dO over packed rows begin to end of the `rows` from token
    i_start on. CAUSAL: the block's keys are those of tokens i_n to i_n + BN, and rows of earlier
    tokens do not see them."""
    slope = exponent(scale, b_k.dtype)
    # Where a loop might not run, ptxas (of Triton 3.6, sm_90) does not see that whole warps issue
    # the products, and waits for each. A tile past the last row adds zeros.
    end = tl.maximum(end, begin + 1)
    tl.assume(begin < end)
    for i_r in range(begin, end, BM):
        # [BM, BC]; zeros past the last row leave both sums as they are
        b_q = load_rows(q, i_start, i_r, rows, Q_STRIDE, HEADS, C, BM, BC)
        b_do = load_rows(dout, i_start, i_r, rows, DO_STRIDE, HEADS, C, BM, BC)
        # [BM]
        b_lse = exponent(load_numbers(lse, i_start, i_r, rows, N, HEADS, BM), b_k.dtype)
        b_delta = load_numbers(delta, i_start, i_r, rows, N, HEADS, BM)
        # [BN, BC] @ [BC, BM] -> [BN, BM]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = power(b_s * slope - b_lse[None, :], b_k.dtype)
        if CAUSAL:
            o_r = i_r + tl.arange(0, BM)
            # the first row that sees each key
            o_first = (i_n + tl.arange(0, BN)) * HEADS
            b_p = tl.where(o_first[:, None] <= o_r[None, :], b_p, 0.0)
        # [BN, BM] @ [BM, BC] -> [BN, BC]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, acc=b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, acc=b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "B"])
def prefix_attention_bwd_dkv_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    cu_seqlens,
    dk,
    dv,
    T,
    B,
    scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    DO_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """dk and dv of the tokens [splits, T, G, C], each split the sum over its share of the rows."""
    N: tl.constexpr = G * HEADS
    i_g = tl.program_id(1)
    i_split = tl.program_id(2)
    i_h = i_g * HEADS
    i_b, i_start, S, i_tile = find_tile(cu_seqlens, tl.program_id(0), B, 1, BN)
    i_n = i_tile * BN
    if i_n >= S:
        return
    rows = S * HEADS
    tiles = tl.cdiv(tl.cdiv(rows - i_n * HEADS, BM), tl.num_programs(2))
    begin = i_n * HEADS + i_split * tiles * BM
    end = tl.minimum(begin + tiles * BM, rows)

    # [BN, BC]
    k += i_start.to(tl.int64) * K_STRIDE + i_g * C
    v += i_start.to(tl.int64) * V_STRIDE + i_g * C
    b_k = load_keys(k, i_n, S, K_STRIDE, C, BN, BC)
    b_v = load_keys(v, i_n, S, V_STRIDE, C, BN, BC)
    b_dk = tl.zeros([BN, BC], dtype=tl.float32)
    b_dv = tl.zeros([BN, BC], dtype=tl.float32)
    q += i_h * C
    dout += i_h * C
    lse += i_h
    delta += i_h
    b_dk, b_dv = add_dkv(
        b_dk,
        b_dv,
        b_k,
        b_v,
        q,
        dout,
        lse,
        delta,
        i_start,
        i_n,
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
        True,
    )

    o_split = i_split.to(tl.int64) * T * G * C + i_g * C
    store_rows(dk + o_split, b_dk * scale, i_start, i_n, S, G * C, 1, C, BN, BC)
    store_rows(dv + o_split, b_dv, i_start, i_n, S, G * C, 1, C, BN, BC)


@triton.jit(do_not_specialize=["splits"])
def prefix_attention_bwd_sum_kernel(dk_splits, dv_splits, dk, dv, splits, count, BE: tl.constexpr):
    """dk and dv [count], the sums of [splits, count]."""
    # [BE]
    o_e = tl.program_id(0).to(tl.int64) * BE + tl.arange(0, BE)
    b_dk = tl.zeros([BE], dtype=tl.float32)
    b_dv = tl.zeros([BE], dtype=tl.float32)
    for _ in range(splits):
        b_dk += tl.load(dk_splits + o_e, mask=o_e < count, other=0.0)
        b_dv += tl.load(dv_splits + o_e, mask=o_e < count, other=0.0)
        dk_splits += count
        dv_splits += count
    tl.store(dk + o_e, b_dk, mask=o_e < count)
    tl.store(dv + o_e, b_dv, mask=o_e < count)


def token_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dk and dv [T, G, C] of the tokens."""
    (T, N, C), G, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    tile, BC = dkv_tile(q)
    splits = row_splits(G * triton.cdiv(T, KEYS_OF_A_PROGRAM), T * N // G)
    sums = split_sums(dk, dv, splits)
    launch(
        prefix_attention_bwd_dkv_kernel,
        (T // tile.keys + B, G, splits),
        dout,
        q,
        k,
        v,
        lse,
        delta,
        cu_seqlens,
        *sums,
        T,
        B,
        scale,
        G=G,
        HEADS=N // G,
        C=C,
        DO_STRIDE=dout.stride(0),
        Q_STRIDE=q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        BM=tile.rows,
        BN=tile.keys,
        BC=BC,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    add_splits(sums, dk, dv, splits)
    return dk, dv


def dkv_tile(q: Tensor) -> tuple[AttentionTile, int]:
    """The tile for the device that q lies on, and the block of channels."""
    BC = block_of_channels(q.shape[2])
    return fit_channels(by_shared_memory(TILES, q.device)[q.element_size()], BC), BC


def row_splits(programs: int, rows: int) -> int:
    """Among how many programs the rows of a block of keys are divided."""
    return max(min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(rows, ROWS_OF_A_SPLIT)), 1)


def split_sums(dk: Tensor, dv: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where programs write: the results themselves, or float32 [splits, ...] for each."""
    if splits == 1:
        return dk, dv
    return dk.new_empty(2, splits, *dk.shape, dtype=torch.float32).unbind()


def add_splits(sums: tuple[Tensor, Tensor], dk: Tensor, dv: Tensor, splits: int) -> None:
    if splits > 1:
        count, BE = dk.numel(), 1024
        launch(
            prefix_attention_bwd_sum_kernel,
            triton.cdiv(count, BE),
            *sums,
            dk,
            dv,
            splits,
            count,
            BE=BE,
            num_warps=4,
        )
