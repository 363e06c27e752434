"""Output layer and cross entropy; the formulas are in glmkern/ops/linear_cross_entropy.py.

A chunk of labelled rows at a time goes through three steps: cuBLAS forms the logits [L, V]; one
kernel, a program a row, reads them, writes the row's loss and turns them in place into
softmax - onehot; cuBLAS multiplies that with the weight. The kernel moves each logit three times
while the products do 4 H flops for it, so its time is small beside theirs.

Only labelled rows are computed. How many there are decides the shapes of everything that follows.
Where the caller has not left the others out (ignore_index None), the number is read back from the
device: one synchronisation a call, as in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmkern.ops.linear_cross_entropy import CHUNK_ELEMENTS
from glmkern.triton_kernels.launch import launch
from glmkern.triton_kernels.quant_linear import quant_linear_bwd, quant_linear_fwd
from glmkern.triton_kernels.tiles import row_tile

# A product with fewer rows would wait for the weight: a chip does 150 to 300 half-precision
# multiplications and additions for every number that it reads.
LEAST_CHUNK_ROWS = 512
# 8 elements a thread of 16 warps: with 16, the registers left one program to a multiprocessor.
MAX_COLUMNS = 4096
SCALE_COLUMNS = 1024
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def load_logits(p_row, i_v, V: tl.constexpr, BV: tl.constexpr):
    """Logits i_v to i_v + BV of a row in fp32; -inf from its end on."""
    o_v = i_v + tl.arange(0, BV)
    # [BV]
    return tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)


# Chunks begin anywhere in labels, row_weight and loss, of which a program takes one number each.
@triton.jit(do_not_specialize_on_alignment=["labels", "row_weight", "loss"])
def cross_entropy_kernel(
    logits,
    labels,
    row_weight,
    loss,
    smoothing,
    V: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRAD: tl.constexpr,
    BV: tl.constexpr,
):
    """loss [L] = row_weight * (logsumexp(logits) - q logits), a row of logits [L, V] a program;
    with GRAD the row becomes softmax - q. q is onehot(label), with SMOOTH smoothed."""
    i_l = tl.program_id(0).to(tl.int64)
    p_row = logits + i_l * V
    label = tl.load(labels + i_l)

    # Every lane has a maximum and a sum of its own, so that a block waits for no other thread.
    # [BV]
    b_max = tl.full([BV], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BV], dtype=tl.float32)
    b_rest = tl.zeros([BV], dtype=tl.float32)
    z_label = tl.load(p_row + label).to(tl.float32)
    for i_v in range(0, V, BV):
        b_z = load_logits(p_row, i_v, V, BV)
        if SMOOTH:
            b_rest += tl.where(i_v + tl.arange(0, BV) < V, b_z - z_label, 0.0)
        b_new = tl.maximum(b_max, b_z)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
        b_max = b_new
    row_max = tl.max(b_max, 0)
    row_sum = tl.sum(b_sum * tl.exp(b_max - row_max), 0)

    value = tl.log(row_sum) + (row_max - z_label)
    if SMOOTH:
        value -= smoothing * (tl.sum(b_rest, 0) / V)
    tl.store(loss + i_l, tl.load(row_weight + i_l) * value)
    if GRAD:
        # z_label may be loaded by a thread that another one overtakes
        tl.debug_barrier()
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            # [BV]
            b_p = tl.exp(load_logits(p_row, i_v, V, BV) - row_max) / row_sum
            b_q = (o_v == label).to(tl.float32)
            if SMOOTH:
                b_q = (1 - smoothing) * b_q + smoothing / V
            tl.store(p_row + o_v, b_p - b_q, mask=o_v < V)


@triton.jit(do_not_specialize=["M"])
def scale_kernel(x, factor, y, M, H: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """y [M, H] = x * factor, rounded to y's dtype; factor is a number on the device."""
    # [BM, 1], [1, BH]
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)[None, :]
    # [BM, BH]
    m_x = (o_m < M) & (o_h < H)
    b_x = tl.load(x + o_m * H + o_h, mask=m_x, other=0.0)
    tl.store(y + o_m * H + o_h, b_x * tl.load(factor), mask=m_x)


def linear_cross_entropy_fwd(
    hidden: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    hidden_grad: bool,
) -> tuple[Tensor, Tensor]:
    labelled = None  # int64 [L]; None: all rows, in order
    if ignore_index is not None:
        labelled = (labels != ignore_index).nonzero().squeeze(1)
    labels = _rows_of(labels, labelled)
    weight = packed.to(hidden.dtype) if scale is None else None
    L, V = len(labels), packed.shape[0]
    row_weight = (
        hidden.new_full((L,), 1 / max(L, 1), dtype=torch.float32)
        if token_weight is None
        else _rows_of(token_weight, labelled)
    )
    loss = hidden.new_empty(L, dtype=torch.float32)
    dhidden = hidden.new_zeros(hidden.shape if hidden_grad else 0, dtype=torch.float32)

    chunks = triton.cdiv(L, max(CHUNK_ELEMENTS // V, LEAST_CHUNK_ROWS))
    for i in range(chunks):
        chunk = slice(i * L // chunks, (i + 1) * L // chunks)
        rows = chunk if labelled is None else labelled[chunk]
        logits = (
            quant_linear_fwd(hidden[rows], packed, scale, bits, None)
            if weight is None
            else hidden[rows] @ weight.T
        )
        cross_entropy(
            logits, labels[chunk], row_weight[chunk], loss[chunk], hidden_grad, label_smoothing
        )
        if hidden_grad:
            # The row's weight comes after the product: a small one would underflow in half.
            back = (
                quant_linear_bwd(logits, packed, scale, bits) if weight is None else logits @ weight
            )
            dhidden[rows] = back.float() * row_weight[chunk].unsqueeze(1)
    return loss.sum(), dhidden


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x[rows]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    loss: Tensor,
    grad: bool,
    smoothing: float = 0.0,
) -> None:
    """Writes the rows' weighted losses to `loss` and, with `grad`, the gradient of the unweighted
    ones to `logits`."""
    L, V = logits.shape
    BV = min(triton.next_power_of_2(V), MAX_COLUMNS)
    launch(
        cross_entropy_kernel,
        L,
        logits,
        labels,
        row_weight,
        loss,
        smoothing,
        V=V,
        SMOOTH=smoothing > 0,
        GRAD=grad,
        BV=BV,
        num_warps=min(max(BV // 256, 4), 16),
    )


def linear_cross_entropy_bwd(dloss: Tensor, dhidden: Tensor, dtype: torch.dtype) -> Tensor:
    M, H = dhidden.shape
    dhidden = dhidden.contiguous()
    result = torch.empty_like(dhidden, dtype=dtype)
    tile = row_tile(min(H, SCALE_COLUMNS))
    launch(
        scale_kernel,
        (triton.cdiv(M, tile.rows), triton.cdiv(H, tile.columns)),
        dhidden,
        dloss,
        result,
        M,
        H=H,
        BM=tile.rows,
        BH=tile.columns,
        num_warps=tile.num_warps,
    )
    return result
