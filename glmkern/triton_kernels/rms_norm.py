"""RMSNorm forward and backward; the formulas are in glmkern/ops/rms_norm.py.

A program owns BM whole rows [BM, H] and walks them in blocks of BH columns, twice: to reduce, then
to write. The last block stays in registers in between. Up to 8192 columns it is the only block, so
that each tensor passes through memory once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import contiguous, launch
from glmkern.triton_kernels.tiles import row_tile

# Partial sums of dweight: two programs for each of the 128 or 132 multiprocessors of the large
# chips. The number is fixed, so that the order of the sum does not depend on the chip.
MAX_PARTIALS = 256


@triton.jit
def load_block(base, o_m, i_h, M, H: tl.constexpr, BH: tl.constexpr):
    """Rows o_m, columns i_h to i_h + BH in fp32; zero outside the matrix."""
    o_h = i_h + tl.arange(0, BH)
    # [BM, BH]
    m_mh = (o_m[:, None] < M) & (o_h[None, :] < H)
    return tl.load(base + o_m[:, None] * H + o_h[None, :], mask=m_mh, other=0.0).to(tl.float32)


@triton.jit
def store_block(base, b_value, o_m, i_h, M, H: tl.constexpr, BH: tl.constexpr):
    o_h = i_h + tl.arange(0, BH)
    # [BM, BH]
    m_mh = (o_m[:, None] < M) & (o_h[None, :] < H)
    tl.store(base + o_m[:, None] * H + o_h[None, :], b_value, mask=m_mh)


@triton.jit
def load_row(base, i_h, H: tl.constexpr, BH: tl.constexpr):
    """Elements i_h to i_h + BH of a vector, as one row in fp32; zero from its end on."""
    o_h = i_h + tl.arange(0, BH)
    # [1, BH]
    return tl.load(base + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_sum(x, residual, h, o_m, i_h, M, H: tl.constexpr, BH: tl.constexpr):
    """A block of x, or of h = x + residual, which is rounded and stored on the way."""
    # [BM, BH]
    b_h = load_block(x, o_m, i_h, M, H, BH)
    if residual is not None:
        b_h += load_block(residual, o_m, i_h, M, H, BH)
        b_h = b_h.to(h.dtype.element_ty).to(tl.float32)
        store_block(h, b_h, o_m, i_h, M, H, BH)
    return b_h


@triton.jit(do_not_specialize=["M"])
def rms_norm_fwd_kernel(
    x, residual, weight, y, h, rstd, M, eps, H: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr
):
    """y = h * rsqrt(mean(h^2) + eps) * weight, with h = x + residual, or h = x for no residual."""
    LAST: tl.constexpr = (H - 1) // BH * BH
    # [BM]
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)

    # [BM, BH]
    b_square = tl.zeros([BM, BH], dtype=tl.float32)
    for i_h in range(0, LAST, BH):
        b_h = load_sum(x, residual, h, o_m, i_h, M, H, BH)
        b_square += b_h * b_h
    b_h = load_sum(x, residual, h, o_m, LAST, M, H, BH)
    b_square += b_h * b_h
    # [BM]
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) / H + eps)

    # [BM, BH] * [BM, 1] * [1, BH]
    b_y = b_h * b_rstd[:, None] * load_row(weight, LAST, H, BH)
    store_block(y, b_y, o_m, LAST, M, H, BH)
    # not before y: Triton 3.6 then spilled a register on sm_80
    tl.store(rstd + o_m, b_rstd, mask=o_m < M)
    if LAST > 0:
        # the thread that stored an element of h need not be the one that loads it
        tl.debug_barrier()
    for i_h in range(0, LAST, BH):
        b_y = load_block(h, o_m, i_h, M, H, BH) * b_rstd[:, None] * load_row(weight, i_h, H, BH)
        store_block(y, b_y, o_m, i_h, M, H, BH)


@triton.jit
def store_dx(dx, dresidual, b_dx, o_m, i_h, M, H: tl.constexpr, BH: tl.constexpr):
    if dresidual is not None:
        b_dx += load_block(dresidual, o_m, i_h, M, H, BH)
    store_block(dx, b_dx, o_m, i_h, M, H, BH)


@triton.jit
def add_to_row(base, b_value, i_h, H: tl.constexpr, BH: tl.constexpr):
    """Adds b_value [BH] to elements i_h to i_h + BH of a vector that only this program touches."""
    o_h = i_h + tl.arange(0, BH)
    # another thread may load an element than the one that stored it
    tl.debug_barrier()
    # [BH]
    b_value += tl.load(base + o_h, mask=o_h < H, other=0.0)
    tl.store(base + o_h, b_value, mask=o_h < H)


@triton.jit(do_not_specialize=["M", "tiles"])
def rms_norm_bwd_kernel(
    dy,
    x,
    weight,
    rstd,
    dresidual,
    dx,
    dweight,
    M,
    tiles,
    H: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
):
    """dx = rstd * (g - n * mean(g * n)) + dresidual with n = x * rstd and g = dy * weight.

    dweight [programs, H], fp32 zeros, or None, receives each program's sum of dy * n over its rows,
    `tiles` consecutive tiles. Nothing is added atomically.
    """
    LAST: tl.constexpr = (H - 1) // BH * BH
    i_p = tl.program_id(0)
    p_dw = dweight + i_p.to(tl.int64) * H if dweight is not None else None
    # [1, BH]
    b_w = load_row(weight, LAST, H, BH)
    # [BM, BH]
    b_dw = tl.zeros([BM, BH], dtype=tl.float32)

    for i in range(tiles):
        i_t = i_p * tiles + i
        # [BM]
        o_m = i_t.to(tl.int64) * BM + tl.arange(0, BM)
        b_rstd = tl.load(rstd + o_m, mask=o_m < M, other=0.0)[:, None]

        # [BM, BH]
        b_dot = tl.zeros([BM, BH], dtype=tl.float32)
        for i_h in range(0, LAST, BH):
            b_n = load_block(x, o_m, i_h, M, H, BH) * b_rstd
            b_dy = load_block(dy, o_m, i_h, M, H, BH)
            b_dot += b_dy * load_row(weight, i_h, H, BH) * b_n
        b_n = load_block(x, o_m, LAST, M, H, BH) * b_rstd
        b_dy = load_block(dy, o_m, LAST, M, H, BH)
        b_dot += b_dy * b_w * b_n
        # [BM, 1]
        b_mean = tl.sum(b_dot, 1)[:, None] / H

        # [BM, BH]
        b_dx = b_rstd * (b_dy * b_w - b_n * b_mean)
        store_dx(dx, dresidual, b_dx, o_m, LAST, M, H, BH)
        b_dw += b_dy * b_n
        for i_h in range(0, LAST, BH):
            b_n = load_block(x, o_m, i_h, M, H, BH) * b_rstd
            b_dy = load_block(dy, o_m, i_h, M, H, BH)
            b_dx = b_rstd * (b_dy * load_row(weight, i_h, H, BH) - b_n * b_mean)
            store_dx(dx, dresidual, b_dx, o_m, i_h, M, H, BH)
            if dweight is not None:
                add_to_row(p_dw, tl.sum(b_dy * b_n, 0), i_h, H, BH)

    if dweight is not None:
        add_to_row(p_dw, tl.sum(b_dw, 0), LAST, H, BH)


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight = contiguous(x, weight)
    y, rstd = _launch_fwd(x, None, weight, x, eps)
    return y, rstd


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = contiguous(x, residual, weight)
    h = torch.empty_like(x)
    y, rstd = _launch_fwd(x, residual, weight, h, eps)
    return y, h, rstd


def _launch_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, h: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    H = x.shape[-1]
    M = x.numel() // H
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    tile = row_tile(H)
    launch(
        rms_norm_fwd_kernel,
        triton.cdiv(M, tile.rows),
        x,
        residual,
        weight,
        y,
        h,
        rstd,
        M,
        eps,
        H=H,
        BM=tile.rows,
        BH=tile.columns,
        num_warps=tile.num_warps,
    )
    return y, rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    dy, x, weight, rstd, dresidual = contiguous(dy, x, weight, rstd, dresidual)
    H = x.shape[-1]
    M = x.numel() // H
    dx = torch.empty_like(x)
    tile = row_tile(H)
    programs, tiles = triton.cdiv(M, tile.rows), 1
    partials = None
    if weight_grad:
        tiles = triton.cdiv(programs, MAX_PARTIALS)
        programs = triton.cdiv(programs, max(tiles, 1))
        partials = x.new_zeros(programs, H, dtype=torch.float32)
    launch(
        rms_norm_bwd_kernel,
        programs,
        dy,
        x,
        weight,
        rstd,
        dresidual,
        dx,
        partials,
        M,
        tiles,
        H=H,
        BM=tile.rows,
        BH=tile.columns,
        num_warps=tile.num_warps,
    )
    if partials is None:
        return dx, x.new_empty(0)
    return dx, partials.sum(0).to(weight.dtype)
