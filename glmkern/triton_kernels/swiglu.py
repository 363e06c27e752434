"""SwiGLU forward and backward; the formulas are in glmkern/ops/swiglu.py.

A program owns BM rows by BF gates and the ups that belong to them. Nothing is reduced, so that each
tensor passes through memory once, in tiles of one size whatever the width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.triton_kernels.launch import contiguous, launch
from glmkern.triton_kernels.tiles import row_tile

MAX_COLUMNS = 1024


@triton.jit
def tile_offsets(M, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """This program's elements: their offsets in a matrix of F columns, those of their gates in one
    of 2F, and which of them there are."""
    # [BM, 1]
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    # [1, BF]
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    # [BM, BF]
    return o_m * F + o_f, o_m * (2 * F) + o_f, (o_m < M) & (o_f < F)


@triton.jit
def gated(b_gate, b_up):
    """gate * sigmoid(gate) * up, in float32."""
    return b_gate * tl.sigmoid(b_gate) * b_up


@triton.jit(do_not_specialize=["M"])
def swiglu_fwd_kernel(x, y, M, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    # [BM, BF]
    o_y, o_x, m_y = tile_offsets(M, F, BM, BF)
    b_gate = tl.load(x + o_x, mask=m_y, other=0.0).to(tl.float32)
    b_up = tl.load(x + o_x + F, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y + o_y, gated(b_gate, b_up), mask=m_y)


@triton.jit(do_not_specialize=["M"])
def swiglu_bwd_kernel(dy, x, dx, M, F: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """With s = sigmoid(gate): d gate = dy * up * s * (1 + gate * (1 - s)), d up = dy * gate * s."""
    # [BM, BF]
    o_y, o_x, m_y = tile_offsets(M, F, BM, BF)
    b_dy = tl.load(dy + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_gate = tl.load(x + o_x, mask=m_y, other=0.0).to(tl.float32)
    b_up = tl.load(x + o_x + F, mask=m_y, other=0.0).to(tl.float32)
    b_s = tl.sigmoid(b_gate)
    b_dgate = b_dy * b_up * b_s * (1 + b_gate * (1 - b_s))
    b_dup = b_dy * (b_gate * b_s)
    tl.store(dx + o_x, b_dgate, mask=m_y)
    tl.store(dx + o_x + F, b_dup, mask=m_y)


def swiglu_fwd(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _launch(swiglu_fwd_kernel, y.shape, x, y)
    return y


def swiglu_bwd(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = contiguous(dy, x)
    dx = torch.empty_like(x)
    _launch(swiglu_bwd_kernel, dy.shape, dy, x, dx)
    return dx


def _launch(kernel: triton.JITFunction, shape: torch.Size, *tensors: Tensor) -> None:
    M, F = shape[:-1].numel(), shape[-1]
    tile = row_tile(min(F, MAX_COLUMNS))
    launch(
        kernel,
        (triton.cdiv(M, tile.rows), triton.cdiv(F, tile.columns)),
        *tensors,
        M,
        F=F,
        BM=tile.rows,
        BF=tile.columns,
        num_warps=tile.num_warps,
    )
