"""The Triton quant_linear: every variant against float64, and what only these kernels can get
wrong."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import quant_linear as kernels
from glmkern.triton_kernels import swiglu
from glmkern.triton_kernels.quant_linear.fused import FusedTile
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits
from tests.ops.test_quant_linear import check, check_dense, check_swiglu, quantized

OP = "quant_linear_fwd"
library = torch.ops.glmkern

# Odd rows, columns of 2 mod 4 and of 4 mod 8, whole words, more than one tile. With fewer rows,
# matches_fp64 would draw more often.
SHAPES = [
    (1, 37, 70),
    (3, 51, 66),
    (8, 51, 264),
    (15, 35, 100),
    (17, 70, 136),
    (63, 35, 34),
]  # M, N, K
REAL_TILES = [(17, 131, 142), (63, 130, 518)]
VARIANTS = ["gemv", "fused", "slab"]


@pytest.fixture
def small_tiles(backend, monkeypatch):
    """Loops, splits and groups of several tiles at small sizes."""
    tiles = {64: (FusedTile(16, 16, 16, 4, 2),)}
    for table in ("FWD_TILES", "BWD_TILES", "FWD_TILES_FP32", "BWD_TILES_FP32"):
        monkeypatch.setattr(kernels.fused, table, tiles)
    monkeypatch.setattr(kernels, "MIN_BLOCKS", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    monkeypatch.setattr(kernels, "GROUP", 2)


@pytest.fixture
def forced(backend, monkeypatch):
    """forced(variant) makes the op choose it."""

    def force(variant):
        monkeypatch.setattr(kernels, "choose", lambda *args: variant)

    return force


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fused(backend, m, n, k, dtype, small_tiles, forced):
    forced("fused")
    check(m, n, k, dtype, quantized(n, k))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 51, 66), (17, 70, 136)])
def test_fused_with_columns_joined(backend, m, n, k, dtype, small_tiles, forced, monkeypatch):
    for table in ("FWD_TILES", "BWD_TILES"):
        monkeypatch.setattr(kernels.fused, table, {64: (FusedTile(16, 16, 16, 4, 2, joined=True),)})
    forced("fused")
    check(m, n, k, dtype, quantized(n, k))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_smallest(backend, variant, dtype):
    """One token, one row, one byte: 3 * 1.5 - 7 * 2."""
    packed = torch.tensor([[0x39]], dtype=torch.int8)
    x, scale, bias, dy = (
        torch.tensor(value, dtype=dtype) for value in ([[1.5, 2.0]], [0.5], [0.25], [[4.0]])
    )
    y = kernels.quant_linear_fwd(x, packed, scale, 4, bias, variant=variant)
    dx = kernels.quant_linear_bwd(dy, packed, scale, 4, variant=variant)
    assert y.tolist() == [[-4.5]]
    assert dx.tolist() == [[6.0, -14.0]]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), REAL_TILES)
def test_fused_at_its_real_tiles(backend, m, n, k, dtype, forced):
    forced("fused")
    check(m, n, k, dtype, quantized(n, k))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("programs", [1, 12], ids=["one split", "splits"])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 66, 66), (17, 70, 136), (33, 16, 34)])
def test_fused_with_swiglu(backend, m, n, k, programs, dtype, small_tiles, forced, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    forced("fused")
    check_swiglu(m, n, k, dtype, quantized(n, k))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 51, 600), (2, 51, 66), (8, 51, 136)])
def test_gemv(backend, m, n, k, bits, dtype, forced):
    forced("gemv")
    check(m, n, k, dtype, quantized(n, k, bits))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "l2"), [(5, 36, 34, 2**11), (17, 70, 136, 2**13), (63, 51, 34, 2**13)]
)
def test_slab(backend, m, n, k, l2, bits, dtype, forced, monkeypatch):
    """Slabs of six rows or columns, and of more."""
    monkeypatch.setattr(kernels, "l2_bytes", lambda device: l2)
    forced("slab")
    check(m, n, k, dtype, quantized(n, k, bits))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_of_another_dtype(backend, variant, dtype, scale_dtype, small_tiles, forced):
    forced(variant)
    check(7, 51, 66, dtype, quantized(51, 66, dtype=scale_dtype))


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 51, 131), (17, 51, 70)])
def test_dense(backend, m, n, k, dtype, stored, monkeypatch):
    monkeypatch.setattr(kernels, "l2_bytes", lambda device: 2**11)
    check_dense(m, n, k, dtype, (torch.randn(n, k) * 0.02).to(stored))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored", HALF_AND_SINGLE, ids=str)
def test_slabs_are_the_dequantised_weight(backend, stored, bits):
    """To the last bit, in slabs of rows and of columns, without one as large as the weight."""
    qweight = quantized(301, 310, bits)
    expected = ops.dequantize(qweight, stored)
    for dim in range(2):
        pieces, addresses = [], set()
        with mock.patch.object(kernels, "l2_bytes", lambda device: 310 * 256 * stored.itemsize):
            for _, weight in kernels._slabs(*qweight, stored, dim):
                pieces.append(weight.clone())
                addresses.add(weight.data_ptr())
        assert [piece.shape[dim] for piece in pieces] == [128, 128, (301, 310)[dim] - 256]
        assert len(addresses) == 1
        assert same_bits(torch.cat(pieces, dim), expected)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_far_below_the_smallest_half(backend, variant, small_tiles):
    """dy * scale in half would underflow. A weight rounded to half, as two of the variants have it,
    adds at most its rounding."""
    qweight = quantized(64, 128, 4)
    dy = (torch.randn(5, 64) * 1e-5).half()
    dx = kernels.quant_linear_bwd(dy, *qweight, variant=variant)
    weight = ops.dequantize(qweight, torch.float64)
    allowed = 2**-25  # half a subnormal's step
    if variant != "gemv":
        allowed += dy.double().abs() @ (weight - weight.half().double()).abs()
    assert ((dx.double() - dy.double() @ weight).abs() <= allowed).all()


@pytest.mark.backends("triton")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(backend, variant, value, small_tiles, forced):
    forced(variant)
    weight = torch.tensor([[1.0, -3.0, 7.0, 0.0], [0.0, -7.0, 0.0, 2.0]])
    x = torch.ones(5, 4)
    x[2, 1] = value
    result = ops.quant_linear(x, ops.quantize(weight))
    torch.testing.assert_close(result.cpu(), F.linear(x, weight), equal_nan=True, rtol=0, atol=0)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_every_time(backend, variant, dtype, small_tiles):
    qweight = quantized(70, 136, 4)
    x, dy = (torch.randn(7, size).to(dtype) for size in (136, 70))
    bias = torch.randn(70).to(dtype)

    def run():
        with poisoned_memory():
            return [
                kernels.quant_linear_fwd(x, *qweight, bias, variant=variant),
                kernels.quant_linear_bwd(dy, *qweight, variant=variant),
            ]

    assert all(map(same_bits, run(), run()))


@pytest.mark.backends("triton")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 2), (5, 35, 66), (8, 37, 136)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_touches_nothing_outside(backend, variant, m, n, k, small_tiles, monkeypatch):
    """Inputs lie between NaNs (codes between sevens), outputs between guards."""
    monkeypatch.setattr(kernels, "l2_bytes", lambda device: 2**10)
    buffers = []

    def surrounded(shape, fill, dtype=torch.float32):
        size = torch.Size(shape).numel()
        buffers.append(torch.full((size + 4096,), fill, dtype=dtype))
        return buffers[-1][2048 : 2048 + size].view(shape)

    qweight = quantized(n, k, 4)
    packed = surrounded(qweight.packed.shape, 0x77, torch.int8).copy_(qweight.packed)
    scale = surrounded([n], torch.nan).copy_(qweight.scale)
    x, dy, bias = (
        surrounded(shape, torch.nan).copy_(torch.randn(shape)) for shape in ([m, k], [m, n], [n])
    )
    inside = len(buffers)
    new_empty = torch.Tensor.new_empty

    def guarded(like, *shape, **options):
        if "device" in options:  # the interpreter's own
            return new_empty(like, *shape, **options)
        return surrounded(shape, 7.0, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    y = kernels.quant_linear_fwd(x, packed, scale, 4, bias, variant=variant)
    dx = kernels.quant_linear_bwd(dy, packed, scale, 4, variant=variant)
    activated, even = y, n // 2 * 2
    if even:
        activated = kernels.quant_linear_swiglu_fwd(x, packed[:even], scale[:even], 4, bias[:even])
    assert all(result.isfinite().all() for result in (y, dx, activated))
    assert len(buffers) >= inside + 2
    for buffer in buffers[inside:]:
        assert (buffer[:2048] == 7.0).all()
        assert (buffer[-2048:] == 7.0).all()


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    ("m", "bits", "names"),
    [
        (1, 4, ["gemv_fwd_kernel", "gemv_bwd_kernel"]),
        (8, 8, ["gemv_fwd_kernel", "gemv_bwd_kernel"]),
        (16, 4, ["fused_fwd_kernel", "fused_bwd_kernel"]),
        (16, 8, ["dequantize_kernel", "dequantize_kernel"]),
    ],
)
def test_forced_backend_runs_the_kernels(backend, m, bits, names):
    qweight = quantized(4, 8, bits)
    x, dy = (torch.ones(m, size).half() for size in (8, 4))
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        torch.ops.glmkern.quant_linear_fwd(x, *qweight, None)
        torch.ops.glmkern.quant_linear_bwd(dy, *qweight)
    assert [call.args[0].__name__ for call in launch.call_args_list] == names


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    ("m", "k", "bits", "names"),
    [
        (1, 8, 4, ["gemv_fwd_kernel"]),
        (16, 2048, 4, ["fused_fwd_kernel", "sum_splits_kernel"]),
        (16, 8, 4, ["fused_fwd_kernel"]),
        (16, 8, 8, ["dequantize_kernel", "swiglu_fwd_kernel"]),
    ],
)
def test_swiglu_is_in_the_last_kernel_unless_that_is_torchs(backend, m, k, bits, names):
    qweight = quantized(4, k, bits)
    names_of = []

    def keep(kernel, *args, **options):
        names_of.append(kernel.__name__)
        launch(kernel, *args, **options)

    launch = kernels.launch
    with mock.patch.object(kernels, "launch", keep), mock.patch.object(swiglu, "launch", keep):
        torch.ops.glmkern.quant_linear_swiglu_fwd(torch.ones(m, k).half(), *qweight, None)
    assert names_of == names


@pytest.mark.parametrize(
    ("direction", "m", "dtype", "bits", "variant"),
    [
        ("fwd", 1, torch.float16, 4, "gemv"),
        ("fwd", 2, torch.bfloat16, 4, "fused"),
        ("bwd", 8, torch.float16, 4, "gemv"),
        ("bwd", 9, torch.float16, 4, "fused"),
        ("fwd", 512, torch.float16, 4, "fused"),
        ("fwd", 513, torch.float16, 4, "slab"),
        ("fwd", 8, torch.float32, 4, "gemv"),
        ("fwd", 32, torch.float32, 4, "fused"),
        ("bwd", 33, torch.float32, 4, "slab"),
        ("fwd", 8, torch.float16, 8, "gemv"),
        ("fwd", 9, torch.float16, 8, "slab"),
        ("fwd", 1, torch.float16, 16, "slab"),
    ],
    ids=str,
)
def test_choice(direction, m, dtype, bits, variant):
    assert kernels.choose(direction, m, dtype, bits) == variant


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(1, 16), (17, 32), (33, 64), (63, 64), (100, 128), (192, 64), (320, 128), (511, 128)],
)
def test_tile_wastes_little(tokens, rows, monkeypatch):
    monkeypatch.setattr(kernels, "by_shared_memory", lambda table, device: table[227])
    for table in (kernels.fused.FWD_TILES, kernels.fused.BWD_TILES):
        assert kernels._fused_tile(table, tokens, torch.device("cpu")).BM == rows


@pytest.mark.parametrize(("blocks", "programs"), [(1, 1), (64, 1), (64, 72), (107, 100), (5, 9000)])
def test_splits_cover_the_reduction(blocks, programs):
    each, splits = kernels._splits(blocks, programs)
    assert each * (splits - 1) < blocks <= each * splits
    assert splits == 1 or each >= kernels.MIN_BLOCKS
    assert splits * programs <= max(programs, kernels.PROGRAMS)


@pytest.mark.parametrize(
    ("length", "each", "l2"),
    [(27392, 8192, 50 * 2**20), (5, 2, 4), (4096, 8192, 2**20), (300, 600, 10**9)],
)
def test_slab_size(length, each, l2):
    size = kernels.slab_size(length, each, l2)
    assert size == length or size % 2 == 0
    assert size * each <= max(l2 // 2, 2 * each)
    assert -(-length // size) <= -(-length * each // (l2 // 2)) * 2 or size <= 128
