"""Linears over weights of 4 or 8 bits, forward and backward; glmkern/ops/quant_linear.py has the
formulas and the format.

Three variants, and `choose` decides between them:

    gemv     up to eight tokens, without tensor cores (gemv.py)
    fused    weights of 4 bits, decoded on their way to the tensor cores (fused.py)
    slab     dequantises as many rows or columns of the weight as half the L2 cache holds, and
             multiplies with torch; dense weights of another dtype go the same way

No variant keeps a dequantised weight, or rounds before the bias. None adds up in half precision;
torch's product may, where torch.backends.cuda.matmul allows a reduced-precision reduction.
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from glmkern.triton_kernels.launch import contiguous, launch
from glmkern.triton_kernels.quant_linear import fused, gemv
from glmkern.triton_kernels.quant_linear.decode import dequantize_kernel
from glmkern.triton_kernels.swiglu import swiglu_fwd
from glmkern.triton_kernels.tiles import by_shared_memory

# The most tokens of each variant; `choose` says why.
GEMV_TOKENS = {"fwd": 1, "bwd": 8}
FUSED_TOKENS = 512
FUSED_TOKENS_FP32 = 32
# Programs that keep all multiprocessors of a large chip busy, two each. The number is fixed, so
# that the order of a sum does not depend on the chip. A split has at least four blocks to walk.
PROGRAMS = 256
MIN_BLOCKS = 4
GROUP = 8
# What the interpreter, which has no L2 cache, is told.
L2_BYTES_ELSEWHERE = 4 * 2**20
# Columns or rows of a slab come in this multiple, the widest tile of a matrix product's.
SLAB_MULTIPLE = 128


def choose(direction: str, M: int, dtype: torch.dtype, bits: int) -> str:
    """The variant for `M` tokens, "fwd" or "bwd"; never to be slower than dequantising the whole
    weight for torch's product. N and K do not decide: all costs below are per weight, predicted
    from data sheets and compiled loops.

    Reading 4 bits a weight takes 0.5 B / BW, and its two flops a token 2 M / F.

    gemv, int4, forward: four instructions a weight at one token. An H200 reads 9.6e12 weights a
    second and decodes 7.5e12, an A100 4e12 and 4.3e12, an RTX 4090 2e12 and more. At two tokens x
    comes from shared memory, which takes three times as long. The tensor cores' loop has three to
    five instructions for up to 16 tokens, but a second launch that adds its splits. The backward of
    so few tokens occurs in no training run; there gemv rounds least. int8 has half the weights a
    byte, and float32 no better loop: 8 tokens.

    fused or slab, half precision: a slab writes and reads 2 B a weight in the L2 cache and is two
    launches; at 5.5 TB/s and 4 us for 10 M weights that is 1.1 ps a weight on an H200. Torch's loop
    saves 2 M / F_fused - 2 M / F_torch: with 450 and 750e12 flops, 1.8e-3 M ps. They are equal near
    600 tokens; with the figures of an A100 and of an RTX 4090 near 450 and 370.

    float32: both are bound by the FMA units. The slab costs 8 B in the L2 cache, 1.5 ps. An FMA a
    token costs 0.03 ps; our loop runs it at about half the rate.
    """
    if bits > 8:
        return "slab"
    if M <= (GEMV_TOKENS[direction] if bits == 4 and dtype != torch.float32 else gemv.MAX_TOKENS):
        return "gemv"
    if bits == 8:
        return "slab"
    limit = FUSED_TOKENS_FP32 if dtype == torch.float32 else FUSED_TOKENS
    return "fused" if M <= limit else "slab"


def quant_linear_fwd(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bits: int,
    bias: Tensor | None,
    variant: str | None = None,
) -> Tensor:
    """`variant` overrides the choice, for tests and measurements."""
    N, K = _shape(packed, bits)
    y = x.new_empty(*x.shape[:-1], N)
    rows, packed, scale, bias = contiguous(x.reshape(-1, K), packed, scale, bias)
    variant = variant or choose("fwd", len(rows), x.dtype, bits)
    if len(rows) > 0:
        _FORWARD[variant](rows, packed, scale, bits, bias, y.view(-1, N))
    return y


def quant_linear_swiglu_fwd(
    x: Tensor, packed: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None
) -> Tensor:
    """A product's last kernel applies swiglu; where torch makes the product, swiglu's own does."""
    N, K = _shape(packed, bits)
    rows = x.reshape(-1, K)
    variant = choose("fwd", len(rows), x.dtype, bits)
    if len(rows) == 0 or variant == "slab":
        return swiglu_fwd(quant_linear_fwd(x, packed, scale, bits, bias))
    y = x.new_empty(*x.shape[:-1], N // 2)
    rows, packed, scale, bias = contiguous(rows, packed, scale, bias)
    _FORWARD[variant](rows, packed, scale, bits, bias, y.view(-1, N // 2), swiglu=True)
    return y


def quant_linear_bwd(
    dy: Tensor, packed: Tensor, scale: Tensor | None, bits: int, variant: str | None = None
) -> Tensor:
    N, K = _shape(packed, bits)
    dx = dy.new_empty(*dy.shape[:-1], K)
    rows, packed, scale = contiguous(dy.reshape(-1, N), packed, scale)
    variant = variant or choose("bwd", len(rows), dy.dtype, bits)
    if len(rows) > 0:
        _BACKWARD[variant](rows, packed, scale, bits, dx.view(-1, K))
    return dx


def _shape(packed: Tensor, bits: int) -> tuple[int, int]:
    return packed.shape[0], packed.shape[1] * (2 if bits == 4 else 1)


def _gemv_fwd(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    bias: Tensor | None,
    y: Tensor,
    swiglu: bool = False,
) -> None:
    M, words, codes = len(x), *_words(packed, bits)
    N, W = words.shape
    BM = triton.next_power_of_2(M)
    tile = gemv.FWD_TILES[BM]
    results = tile.rows // 2 if swiglu else tile.rows  # of a program, from as many rows
    launch(
        gemv.gemv_fwd_kernel,
        triton.cdiv(y.shape[1], results),
        x,
        words,
        scale,
        bias,
        y,
        M,
        N=N,
        W=W,
        CODES=codes,
        BITS=bits,
        SWIGLU=swiglu,
        BM=BM,
        BN=results,
        BW=tile.words,
        num_warps=4,
    )


def _gemv_bwd(dy: Tensor, packed: Tensor, scale: Tensor, bits: int, dx: Tensor) -> None:
    M, words, codes = len(dy), *_words(packed, bits)
    N, W = words.shape
    BM = triton.next_power_of_2(M)
    tile = gemv.BWD_TILES[BM]
    programs = triton.cdiv(W, tile.words)
    blocks, splits = _splits(triton.cdiv(N, tile.rows), programs)
    sums = _split_sums(dx, splits, dx.shape[1])
    launch(
        gemv.gemv_bwd_kernel,
        (programs, splits),
        dy,
        words,
        scale,
        sums,
        M,
        blocks,
        N=N,
        W=W,
        CODES=codes,
        BITS=bits,
        BM=BM,
        BN=tile.rows,
        BW=tile.words,
        num_warps=4,
    )
    _add_splits(sums, None, None, dx)


def _words(packed: Tensor, bits: int) -> tuple[Tensor, int]:
    """The bytes as integers of 32 bits if they are whole ones, else as they are; the columns in
    one."""
    if packed.shape[1] % 4 == 0 and packed.storage_offset() % 4 == 0:
        return packed.view(torch.int32), 32 // bits
    return packed, 8 // bits


def _fused_fwd(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    bias: Tensor | None,
    y: Tensor,
    swiglu: bool = False,
) -> None:
    M, N, K = len(x), *_shape(packed, bits)
    half = x.dtype != torch.float32
    tile = _fused_tile(fused.FWD_TILES if half else fused.FWD_TILES_FP32, M, x.device)
    programs = triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.rows)
    blocks, splits = _splits(triton.cdiv(K, 2 * tile.bytes), programs)
    sums = _split_sums(y, splits, N)
    launch(
        fused.fused_fwd_kernel,
        (programs, splits),
        x,
        packed,
        scale,
        bias,
        sums,
        M,
        blocks,
        N=N,
        K=K,
        SPLIT=splits > 1,
        SWIGLU=swiglu and splits == 1,
        JOINED=tile.joined,
        GROUP=GROUP,
        BM=tile.BM,
        BN=tile.rows,
        BJ=tile.bytes,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _add_splits(sums, scale, bias, y, swiglu)


def _fused_bwd(dy: Tensor, packed: Tensor, scale: Tensor, bits: int, dx: Tensor) -> None:
    M, N, K = len(dy), *_shape(packed, bits)
    half = dy.dtype != torch.float32
    tile = _fused_tile(fused.BWD_TILES if half else fused.BWD_TILES_FP32, M, dy.device)
    programs = triton.cdiv(M, tile.BM) * triton.cdiv(K, 2 * tile.bytes)
    blocks, splits = _splits(triton.cdiv(N, tile.rows), programs)
    sums = _split_sums(dx, splits, K)
    launch(
        fused.fused_bwd_kernel,
        (programs, splits),
        dy,
        packed,
        scale,
        sums,
        M,
        blocks,
        N=N,
        K=K,
        JOINED=tile.joined,
        GROUP=GROUP,
        BM=tile.BM,
        BN=tile.rows,
        BJ=tile.bytes,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _add_splits(sums, None, None, dx)


def _fused_tile(table: dict, M: int, device: torch.device) -> fused.FusedTile:
    """The tile that takes the least time for M tokens: one takes as long as its tokens and the
    decoding of its weights, which takes as long as 48 tokens."""
    return min(
        by_shared_memory(table, device), key=lambda tile: triton.cdiv(M, tile.BM) * (tile.BM + 48)
    )


def _splits(blocks: int, programs: int) -> tuple[int, int]:
    """(blocks of a split, number of splits) for a reduction over `blocks` blocks, where `programs`
    programs a split share the result."""
    splits = max(1, min(PROGRAMS // programs, blocks // MIN_BLOCKS))
    each = triton.cdiv(blocks, splits)
    return each, triton.cdiv(blocks, each)


def _split_sums(result: Tensor, splits: int, columns: int) -> Tensor:
    """What the kernel writes to: the result itself, of M rows, or [splits, M, columns] in fp32."""
    if splits == 1:
        return result
    return result.new_empty(splits, len(result), columns, dtype=torch.float32)


def _add_splits(
    sums: Tensor, scale: Tensor | None, bias: Tensor | None, result: Tensor, swiglu: bool = False
) -> None:
    if sums is result:
        return
    splits, M, N = sums.shape
    launch(
        fused.sum_splits_kernel,
        triton.cdiv(result.numel(), 1024),
        sums,
        scale,
        bias,
        result,
        M,
        splits,
        N=N,
        SWIGLU=swiglu,
        BE=1024,
        num_warps=4,
    )


def _slab_fwd(
    x: Tensor, packed: Tensor, scale: Tensor | None, bits: int, bias: Tensor | None, y: Tensor
) -> None:
    for part, weight in _slabs(packed, scale, bits, x.dtype, 0):
        if bias is None:
            torch.mm(x, weight.T, out=y[:, part])
        else:
            torch.addmm(bias[part], x, weight.T, out=y[:, part])


def _slab_bwd(dy: Tensor, packed: Tensor, scale: Tensor | None, bits: int, dx: Tensor) -> None:
    for part, weight in _slabs(packed, scale, bits, dy.dtype, 1):
        torch.mm(dy, weight, out=dx[:, part])


def _slabs(
    packed: Tensor, scale: Tensor | None, bits: int, dtype: torch.dtype, dim: int
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the weight's rows (dim 0) or columns (dim 1), and the weight there in `dtype`. The
    next slab overwrites the last one; each depends on no other, so nothing is added up."""
    if packed.dtype == dtype:
        yield slice(None), packed
        return
    shape, pack = list(_shape(packed, bits)), 2 if bits == 4 else 1
    length, across = shape[dim], shape[1 - dim]
    size = slab_size(length, across * dtype.itemsize, l2_bytes(packed.device))
    buffer = packed.new_empty(size * across, dtype=dtype)
    for start in range(0, length, size):
        shape[dim] = min(size, length - start)
        part, weight = slice(start, start + shape[dim]), buffer[: shape[dim] * across].view(shape)
        if dim == 0:
            write_weight(packed[part], None if scale is None else scale[part], bits, weight)
        else:
            write_weight(packed[:, start // pack : part.stop // pack], scale, bits, weight)
        yield part, weight


def slab_size(length: int, bytes_each: int, l2: int) -> int:
    """How many of `length` rows or columns a slab has, at most half the L2 cache and all slabs
    about equal: a matrix product's last tiles would wait for those of a short slab."""
    most = l2 // 2 // bytes_each
    multiple = SLAB_MULTIPLE if most >= SLAB_MULTIPLE else 2  # even: two columns a byte
    most = max(most // multiple, 1) * multiple
    slabs = triton.cdiv(length, most)
    return min(length, triton.cdiv(triton.cdiv(length, slabs), multiple) * multiple)


@cache
def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return L2_BYTES_ELSEWHERE
    return torch.cuda.get_device_properties(device).L2_cache_size


def write_weight(packed: Tensor, scale: Tensor | None, bits: int, weight: Tensor) -> None:
    """weight [N, K] from the bytes, or the dense weight, that it stands for."""
    if scale is None:
        weight.copy_(packed)
        return
    N, C = packed.shape
    launch(
        dequantize_kernel,
        (triton.cdiv(N, 8), triton.cdiv(C, 256)),
        packed,
        scale,
        weight,
        N,
        STRIDE=packed.stride(0),
        C=C,
        BITS=bits,
        BN=8,
        BC=256,
        num_warps=4,
    )


_FORWARD = {"gemv": _gemv_fwd, "fused": _fused_fwd, "slab": _slab_fwd}
_BACKWARD = {"gemv": _gemv_bwd, "fused": _fused_bwd, "slab": _slab_bwd}
