"""dropout(x + bias) + residual and its backward; the formula is in glmkern/ops/bias_dropout.py.

A program owns BM rows by BH channels. It finds each row's sequence itself, because the mask's
element index counts from the start of the sequence. Rows of a multiple of four channels draw four
elements at a time. Others draw every element's group: four times the work, by twice the warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels import philox
from glmkern.triton_kernels.launch import contiguous, launch
from glmkern.triton_kernels.tiles import RowTile, row_tile

MAX_COLUMNS = 1024
# Ends of sequences that are compared with the rows at a time: the first number where it suffices,
# else the second. Each number is a kernel to compile.
FEW_ENDS, MAX_ENDS = 16, 128
# Partial sums of dbias: programs along the rows, each for all tiles of its rows, for every block of
# columns. The number is fixed, so that the order of the sum does not depend on the chip.
MAX_PARTIALS = 256
# The arguments of a kernel that drops nothing: see _drop_arguments.
_NOTHING = (None, None, None), (0, 0, 1.0), 1


@triton.jit
def find_sequences(cu_seqlens, sequence_ids, o_m, M, B, BB: tl.constexpr):
    """Of rows o_m [BM]: their places within their sequences, and the ids of these."""
    # [BM]
    i_s = tl.zeros_like(o_m).to(tl.int32)
    for i_b in range(0, B, BB):
        o_b = i_b + tl.arange(0, BB)
        b_end = tl.load(cu_seqlens + 1 + o_b, mask=o_b < B, other=0x7FFFFFFF)
        # [BM, BB]
        b_before = b_end[None, :] <= o_m[:, None]
        i_s += tl.sum(b_before.to(tl.int32), 1)
    # [BM]
    m_m = o_m < M
    b_start = tl.load(cu_seqlens + i_s, mask=m_m, other=0)
    return o_m - b_start, tl.load(sequence_ids + i_s, mask=m_m, other=0)


@triton.jit
def load_factor(
    seed,
    cu_seqlens,
    sequence_ids,
    o_m,
    i_h,
    M,
    B,
    threshold,
    scale,
    H: tl.constexpr,
    BH: tl.constexpr,
    BB: tl.constexpr,
):
    """0 where an element of rows o_m, channels i_h to i_h + BH is dropped, `scale` where it is
    kept."""
    # [BM]
    o_row, b_id = find_sequences(cu_seqlens, sequence_ids, o_m, M, B, BB)
    if H % 4 == 0:
        # [BM, BH / 4]
        o_g = (o_row * (H // 4)).to(tl.uint32)[:, None] + (i_h // 4 + tl.arange(0, BH // 4)).to(
            tl.uint32
        )[None, :]
        m_keep = philox.keep_groups(seed, b_id[:, None], o_g, threshold)
    else:
        # [BM, BH]
        o_i = o_row[:, None] * H + (i_h + tl.arange(0, BH))[None, :]
        m_keep = philox.keep(seed, b_id[:, None], o_i, threshold)
    # [BM, BH]
    return tl.where(m_keep, scale, 0.0)


@triton.jit(do_not_specialize=["M", "B", "threshold"])
def bias_dropout_add_fwd_kernel(
    x,
    bias,
    residual,
    seed,
    cu_seqlens,
    sequence_ids,
    y,
    M,
    B,
    threshold,
    scale,
    H: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BB: tl.constexpr,
):
    """y = factor * (x + bias) + residual; without a seed the factor is 1."""
    i_h = tl.program_id(1) * BH
    # [BM]
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    # [BH]
    o_h = i_h + tl.arange(0, BH)
    # [BM, BH]
    o_x = o_m[:, None] * H + o_h[None, :]
    m_x = (o_m[:, None] < M) & (o_h[None, :] < H)
    b_y = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_residual = tl.load(residual + o_x, mask=m_x, other=0.0).to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
    if seed is not None:
        b_y *= load_factor(
            seed, cu_seqlens, sequence_ids, o_m, i_h, M, B, threshold, scale, H, BH, BB
        )
    tl.store(y + o_x, b_y + b_residual, mask=m_x)


@triton.jit(do_not_specialize=["M", "B", "threshold", "tiles"])
def bias_dropout_add_bwd_kernel(
    dy,
    seed,
    cu_seqlens,
    sequence_ids,
    dx,
    dbias,
    M,
    B,
    threshold,
    scale,
    tiles,
    H: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BB: tl.constexpr,
):
    """dx = factor * dy.

    dbias [programs along the rows, H], fp32, or None, receives each program's sum of dx over its
    rows, `tiles` consecutive tiles. Nothing is added atomically.
    """
    i_p = tl.program_id(0)
    i_h = tl.program_id(1) * BH
    # [BH]
    o_h = i_h + tl.arange(0, BH)
    # [BM, BH]
    b_dbias = tl.zeros([BM, BH], dtype=tl.float32)

    for i in range(tiles):
        # [BM]
        o_m = (i_p * tiles + i).to(tl.int64) * BM + tl.arange(0, BM)
        # [BM, BH]
        o_x = o_m[:, None] * H + o_h[None, :]
        m_x = (o_m[:, None] < M) & (o_h[None, :] < H)
        b_dx = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dx *= load_factor(
            seed, cu_seqlens, sequence_ids, o_m, i_h, M, B, threshold, scale, H, BH, BB
        )
        tl.store(dx + o_x, b_dx, mask=m_x)
        if dbias is not None:
            b_dbias += b_dx

    if dbias is not None:
        # [BH]
        tl.store(dbias + i_p.to(tl.int64) * H + o_h, tl.sum(b_dbias, 0), mask=o_h < H)


def bias_dropout_add_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
) -> Tensor:
    M, H = x.shape[:-1].numel(), x.shape[-1]
    x, bias, residual = contiguous(x, bias, residual)
    y = torch.empty_like(x)
    drop, numbers, BB = _NOTHING
    if p > 0:
        drop, numbers, BB = _drop_arguments(p, seed, cu_seqlens, sequence_ids, M)
    tile = _tile(H)
    launch(
        bias_dropout_add_fwd_kernel,
        (triton.cdiv(M, tile.rows), triton.cdiv(H, tile.columns)),
        x,
        bias,
        residual,
        *drop,
        y,
        M,
        *numbers,
        H=H,
        BM=tile.rows,
        BH=tile.columns,
        BB=BB,
        num_warps=tile.num_warps,
    )
    return y


def bias_dropout_add_bwd(
    dy: Tensor, p: float, seed: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    M, H = dy.shape[:-1].numel(), dy.shape[-1]
    dy = dy.contiguous()
    dx = torch.empty_like(dy)
    drop, numbers, BB = _drop_arguments(p, seed, cu_seqlens, sequence_ids, M)
    tile = _tile(H)
    programs, tiles = triton.cdiv(M, tile.rows), 1
    partials = None
    if bias_grad:
        tiles = triton.cdiv(programs, MAX_PARTIALS)
        programs = triton.cdiv(programs, max(tiles, 1))
        partials = dy.new_empty(programs, H, dtype=torch.float32)
    launch(
        bias_dropout_add_bwd_kernel,
        (programs, triton.cdiv(H, tile.columns)),
        dy,
        *drop,
        dx,
        partials,
        M,
        *numbers,
        tiles,
        H=H,
        BM=tile.rows,
        BH=tile.columns,
        BB=BB,
        num_warps=tile.num_warps,
    )
    if partials is None:
        return dx, dy.new_empty(0)
    return dx, partials.sum(0).to(dy.dtype)


def _tile(H: int) -> RowTile:
    tile = row_tile(min(H, MAX_COLUMNS))
    return tile if H % 4 == 0 else tile._replace(num_warps=2 * tile.num_warps)


def _drop_arguments(
    p: float, seed: Tensor, cu_seqlens: Tensor, sequence_ids: Tensor, M: int
) -> tuple[tuple[Tensor, ...], tuple[int, int, float], int]:
    """A kernel's (seed, cu_seqlens, sequence_ids), its (B, threshold, scale), and BB."""
    B = len(sequence_ids)
    return (
        contiguous(seed, cu_seqlens, sequence_ids),
        (B, *philox.drop_constants(p)),
        FEW_ENDS if B <= FEW_ENDS else MAX_ENDS,
    )
