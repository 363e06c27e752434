"""The backward of prefix_attention: D = rowsum(dO * O) and the gradient of the queries; those of
keys and values are in dkv.py and dprefix.py.

With P = exp(scale * q k^T - lse) and dS = P * (dO v^T - D), dq = scale * dS k. A program owns BM
packed rows of one sequence and group and walks the keys they see, as the forward does: no sum is
shared between programs. Scores are computed a second time for dk and dv, which costs two products
of seven and needs no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import contiguous, launch
from glmkern.triton_kernels.prefix_attention.dkv import token_gradients
from glmkern.triton_kernels.prefix_attention.dprefix import prefix_gradients
from glmkern.triton_kernels.prefix_attention.shared import (
    AttentionTile,
    Prefix,
    block_of_channels,
    exponent,
    find_tile,
    fit_channels,
    hide_unseen,
    load_numbers,
    load_rows,
    load_seen,
    power,
    prefix_of,
    store_numbers,
    store_rows,
    with_dense_heads,
)
from glmkern.triton_kernels.tiles import by_shared_memory

# By KiB of shared memory, then by bytes of an element.
TILES = {
    64: {2: AttentionTile(64, 32, 4, 1), 4: AttentionTile(32, 16, 4, 1)},
    99: {2: AttentionTile(128, 32, 8, 2), 4: AttentionTile(32, 16, 4, 1)},
    163: {2: AttentionTile(128, 64, 8, 2), 4: AttentionTile(32, 16, 4, 1)},
    227: {2: AttentionTile(128, 64, 8, 2), 4: AttentionTile(32, 16, 4, 1)},
}
# Rows of delta a program computes.
DELTA_ROWS = 32


@triton.jit(do_not_specialize=["rows"])
def prefix_attention_bwd_delta_kernel(
    dout,
    out,
    delta,
    rows,
    N: tl.constexpr,
    C: tl.constexpr,
    DO_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """delta = rowsum(dO * O), a row for each head of each token."""
    i_r = tl.program_id(0) * BM
    # [BM, BC]
    b_do = load_rows(dout, 0, i_r, rows, DO_STRIDE, N, C, BM, BC).to(tl.float32)
    b_out = load_rows(out, 0, i_r, rows, N * C, N, C, BM, BC).to(tl.float32)
    store_numbers(delta, tl.sum(b_do * b_out, 1), 0, i_r, rows, N, N, BM)


@triton.jit(do_not_specialize=["B"])
def prefix_attention_bwd_dq_kernel(
    dout,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    lse,
    delta,
    cu_seqlens,
    dq,
    B,
    scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    DO_STRIDE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    PREFIX_STRIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    N: tl.constexpr = G * HEADS
    # A sequence's last tiles see the most keys; they start first.
    i_slot = tl.num_programs(0) - 1 - tl.program_id(0)
    i_g = tl.program_id(1)
    i_h = i_g * HEADS
    i_b, i_start, S, i_tile = find_tile(cu_seqlens, i_slot, B, HEADS, BM)
    i_r = i_tile * BM
    rows = S * HEADS
    if i_r >= rows:
        return

    # [BM, BC]
    b_q = load_rows(q + i_h * C, i_start, i_r, rows, Q_STRIDE, HEADS, C, BM, BC)
    b_do = load_rows(dout + i_h * C, i_start, i_r, rows, DO_STRIDE, HEADS, C, BM, BC)
    b_dq = tl.zeros([BM, BC], dtype=tl.float32)
    # [BM]
    b_lse = exponent(load_numbers(lse + i_h, i_start, i_r, rows, N, HEADS, BM), b_q.dtype)
    b_delta = load_numbers(delta + i_h, i_start, i_r, rows, N, HEADS, BM)
    o_t = (i_r + tl.arange(0, BM)) // HEADS

    if P > 0:
        o_p = i_b.to(tl.int64) * PREFIX_STRIDE + i_g * C
        prefix_k += o_p
        prefix_v += o_p
    k += i_start.to(tl.int64) * K_STRIDE + i_g * C
    v += i_start.to(tl.int64) * V_STRIDE + i_g * C
    slope = exponent(scale, b_q.dtype)
    # no row sees later keys than the last row
    end = tl.minimum((i_r + BM - 1) // HEADS + 1, S)
    for i in range(tl.cdiv(P, BN) + tl.cdiv(end, BN)):
        i_n = i * BN
        # [BN, BC]
        b_k = load_seen(prefix_k, k, i_n, end, P, G * C, K_STRIDE, C, BN, BC)
        b_v = load_seen(prefix_v, v, i_n, end, P, G * C, V_STRIDE, C, BN, BC)
        # [BM, BC] @ [BC, BN] -> [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_p = power(b_s * slope - b_lse[:, None], b_q.dtype)
        b_p = hide_unseen(b_p, 0.0, o_t, i_n, P)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        # [BM, BN] @ [BN, BC] -> [BM, BC]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, acc=b_dq, input_precision="ieee")
    store_rows(dq + i_h * C, b_dq * scale, i_start, i_r, rows, N * C, HEADS, C, BM, BC)


def prefix_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    sequence_ids: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    token_grad: bool,
    prefix_grad: bool,
) -> tuple[Tensor, ...]:
    T, N, C = q.shape
    dout, q, k, v = (with_dense_heads(x) for x in (dout, q, k, v))
    out, lse, cu_seqlens = contiguous(out, lse, cu_seqlens)
    prefix_grad = prefix_grad and prefix_k is not None
    gradients = [q.new_empty(0) for _ in range(5)]
    if not token_grad and not prefix_grad:
        return tuple(gradients)

    prefix = prefix_of(q, prefix_k, prefix_v, p, seed, sequence_ids, with_kept=prefix_grad)
    delta = torch.empty_like(lse)
    BM, BC = DELTA_ROWS, block_of_channels(C)
    launch(
        prefix_attention_bwd_delta_kernel,
        triton.cdiv(T * N, BM),
        dout,
        out,
        delta,
        T * N,
        N=N,
        C=C,
        DO_STRIDE=dout.stride(0),
        BM=BM,
        BC=BC,
        num_warps=4,
    )
    if token_grad:
        gradients[0] = _query_gradient(dout, q, k, v, prefix, lse, delta, cu_seqlens, scale)
        gradients[1:3] = token_gradients(dout, q, k, v, lse, delta, cu_seqlens, scale)
    if prefix_grad:
        gradients[3:] = prefix_gradients(
            dout, q, prefix_k, prefix_v, prefix, lse, delta, cu_seqlens, scale, p
        )
    return tuple(gradients)


def _query_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    (T, N, C), G, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    dq = q.new_empty(q.shape)
    HEADS, BC = N // G, block_of_channels(C)
    tile = fit_channels(by_shared_memory(TILES, q.device)[q.element_size()], BC)
    launch(
        prefix_attention_bwd_dq_kernel,
        (T * HEADS // tile.rows + B, G),
        dout,
        q,
        k,
        v,
        prefix.keys,
        prefix.values,
        lse,
        delta,
        cu_seqlens,
        dq,
        B,
        scale,
        G=G,
        HEADS=HEADS,
        C=C,
        P=prefix.length,
        DO_STRIDE=dout.stride(0),
        Q_STRIDE=q.stride(0),
        K_STRIDE=k.stride(0),
        V_STRIDE=v.stride(0),
        PREFIX_STRIDE=prefix.STRIDE,
        BM=tile.rows,
        BN=tile.keys,
        BC=BC,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dq
