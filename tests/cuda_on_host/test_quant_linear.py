"""The CUDA kernels of quant_linear on the CPU, beyond the tests that all backends share: every
template instance and variant, slabs, splits, narrow rows, unaligned tensors."""

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from tests.cuda_on_host.sanitized import unaligned
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits


def quantized(n, k, bits, scale_dtype=torch.float32):
    return ops.quantize((torch.randn(n, k) * 0.02).to(scale_dtype), bits)


def differentiable(kernels, weight, place=torch.Tensor.clone):
    """x, bias -> y over a StoredWeight, with both passes by the kernels on copies by `place`."""
    data, scale, bits = weight
    stored = place(data), None if scale is None else place(scale), bits

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            return kernels.quant_linear_fwd(place(x), *stored, place(bias))

        @staticmethod
        def backward(ctx, dy):
            return kernels.quant_linear_bwd(place(dy), *stored), dy.sum(0)

    return Linear.apply


def check(kernels, m, qweight, dtype, place=torch.Tensor.clone):
    n, k = qweight.shape
    matches_fp64(
        differentiable(kernels, qweight, place),
        lambda x, b: F.linear(x, ops.dequantize(qweight, x.dtype), b),
        lambda: [torch.randn(s).to(dtype).requires_grad_() for s in ((m, k), (n,))],
    )


# Chunks of 1,024 columns with 4 bits and 512 with 8, whole and ragged; rows for one warp alone and
# for several blocks; one split and three, the last one short.
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "k"), [(37, 1088), (1, 32), (600, 96)])
def test_gemv(kernels, n, k, m, bits):
    check(kernels, m, quantized(n, k, bits), torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(("n", "k"), [(37, 1064), (600, 34), (3, 2)])
def test_gemv_of_narrow_rows(kernels, n, k, m, bits):
    check(kernels, m, quantized(n, k, bits), torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 5])
def test_gemv_of_unaligned_tensors(kernels, m, bits):
    check(kernels, m, quantized(37, 1088, bits), torch.float32, unaligned)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 8])
def test_narrow_rows_have_the_bits_of_wide_ones(kernels, m, bits):
    packed, scale, _ = quantized(300, 1088, bits)
    x, dy = torch.randn(m, 1088), torch.randn(m, 300)
    arguments = [(packed, scale, bits), (unaligned(packed), scale, bits)]
    with poisoned_memory():
        assert same_bits(*(kernels.quant_linear_fwd(x, *weight, None) for weight in arguments))
        assert same_bits(*(kernels.quant_linear_bwd(dy, *weight) for weight in arguments))


# By the code's version: Turing has no bfloat16.
MMA = [(75, torch.float16), (80, torch.float16), (80, torch.bfloat16)]


# All tiles of tokens, rows and columns that fill none; what 16-byte accesses fit in both
# directions, in one, and in none; one step and several.
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "dtype"), MMA, ids=str)
@pytest.mark.parametrize("m", [1, 3, 15, 17, 63, 192])
@pytest.mark.parametrize(("n", "k"), [(72, 288), (70, 288), (37, 70)])
def test_mma(kernels, machine, n, k, m, version, dtype, bits):
    with machine.code_version(version):
        check(kernels, m, quantized(n, k, bits), dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "dtype"), MMA, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 392, 2400), (63, 200, 416), (17, 70, 520)])
def test_mma_in_splits(kernels, machine, m, n, k, version, dtype, bits):
    """Of unequal length."""
    with machine.code_version(version), machine.splits(3), machine.counting() as counted:
        check(kernels, m, quantized(n, k, bits), dtype)
    assert "add_splits_kernel" in {name.split("<")[0] for name in counted}


@pytest.mark.parametrize(("version", "dtype"), MMA, ids=str)
def test_mma_of_unaligned_tensors(kernels, machine, version, dtype):
    with machine.code_version(version):
        check(kernels, 20, quantized(72, 288, 4), dtype, unaligned)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("version", "dtype"), MMA, ids=str)
def test_every_code_is_decoded_exactly(kernels, machine, version, dtype, bits):
    """The unit matrix reads the weight itself."""
    packed = torch.arange(-128, 128).to(torch.int8).view(8, 32)
    codes = ops.dequantize(ops.QuantizedWeight(packed, torch.ones(8), bits), torch.float32)
    weight = packed, torch.ones(8), bits
    with machine.code_version(version), machine.variant("mma"), poisoned_memory():
        y = kernels.quant_linear_fwd(torch.eye(codes.shape[1]).to(dtype), *weight, None)
        dx = kernels.quant_linear_bwd(torch.eye(8).to(dtype), *weight)
    assert y.float().equal(codes.T) and dx.float().equal(codes)


@pytest.mark.parametrize(("version", "dtype"), MMA, ids=str)
def test_gradients_far_below_the_smallest_half(kernels, machine, version, dtype):
    """dy * scale in half would underflow. The weight's rounding is all that is lost."""
    qweight = quantized(64, 128, 4)
    dy = (torch.randn(5, 64) * 1e-5).to(dtype)
    with machine.code_version(version):
        dx = kernels.quant_linear_bwd(dy, *qweight)
    weight, eps = ops.dequantize(qweight, torch.float64), torch.finfo(dtype).eps
    lost = dy.double().abs() @ weight.abs() * 2 * eps
    assert ((dx.double() - dy.double() @ weight).abs() <= lost + 2**-25).all()


def test_gemv_wastes_no_memory_access(kernels, machine):
    """The forward has no conflicts in shared memory; both ask for all that global memory moves."""
    qweight = quantized(256, 1024, 4)
    with machine.counting() as counted:
        kernels.quant_linear_fwd(torch.randn(2, 1024), *qweight, None)
        kernels.quant_linear_bwd(torch.randn(2, 256), *qweight)
    found = {name.split("<")[0]: kernel for name, kernel in counted.items()}
    assert found["gemv_forward_kernel"].conflicts == 0
    assert all(kernel.useful > 0.95 for kernel in found.values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "l2"),
    [(1, 36, 34, 2**5), (9, 70, 136, 2**9), (17, 300, 320, 2**14), (5, 1, 2, 1)],
)
def test_slabs(kernels, machine, m, n, k, l2, dtype, bits):
    """Of two rows or columns, and of 128; the last one is smaller."""
    with machine.variant("slab"), machine.l2_cache(l2):
        check(kernels, m, quantized(n, k, bits), dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("n", "k"), [(40, 272), (41, 278), (3, 2), (130, 258)])
@pytest.mark.parametrize("place", [torch.Tensor.clone, unaligned])
def test_slabs_are_the_dequantised_weight(kernels, machine, place, n, k, dtype, bits):
    """To the last bit: a product with the unit matrix adds zeros to it."""
    packed, scale, _ = qweight = quantized(n, k, bits)
    weight, stored = ops.dequantize(qweight, dtype), (place(packed), place(scale), bits)
    for l2 in (2**7, 2**13, 2**18):
        with machine.variant("slab"), machine.l2_cache(l2), poisoned_memory():
            y = kernels.quant_linear_fwd(torch.eye(k, dtype=dtype), *stored, None)
            dx = kernels.quant_linear_bwd(torch.eye(n, dtype=dtype), *stored)
        assert y.equal(weight.T) and dx.equal(weight)


@pytest.mark.parametrize("stored", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("m", [1, 9])
def test_dense_weights_of_any_dtype(kernels, machine, m, dtype, stored):
    weight = torch.randn(50, 34).to(stored)
    with machine.l2_cache(2**7):
        matches_fp64(
            differentiable(kernels, (weight, None, 8 * weight.element_size())),
            lambda x, b: F.linear(x, weight.to(dtype).to(x.dtype), b),
            lambda: [torch.randn(s).to(dtype).requires_grad_() for s in ((m, 34), (50,))],
        )


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("gemv", torch.float32), ("mma", torch.float16), ("slab", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_same_bits_in_any_order_of_threads(kernels, machine, bits, variant, dtype):
    qweight = quantized(600, 1088, bits)
    x, dy, bias = (torch.randn(s).to(dtype) for s in ((3, 1088), (3, 600), (600,)))

    def run(seed):
        with machine.seed(seed), machine.variant(variant), poisoned_memory():
            y = kernels.quant_linear_fwd(x, *qweight, bias)
            return y, kernels.quant_linear_bwd(dy, *qweight)

    assert all(map(same_bits, run(1), run(2)))


@pytest.mark.parametrize(
    ("m", "dtype", "bits", "names"),
    [
        (8, torch.float32, 4, ["gemv_backward_kernel", "gemv_forward_kernel"]),
        (8, torch.float32, 8, ["gemv_backward_kernel", "gemv_forward_kernel"]),
        (9, torch.float32, 4, ["dequantize_kernel"]),
        (1, torch.float16, 4, ["mma_backward_kernel", "mma_forward_kernel"]),
        (512, torch.float16, 8, ["mma_backward_kernel", "mma_forward_kernel"]),
        (513, torch.float16, 4, ["dequantize_kernel"]),
        (1, torch.float32, 16, []),
    ],
    ids=str,
)
def test_choice(kernels, machine, m, dtype, bits, names):
    weight = quantized(4, 32, bits) if bits <= 8 else (torch.randn(4, 32).half(), None, bits)
    x, dy = (torch.ones(m, size, dtype=dtype) for size in (32, 4))
    with machine.counting() as counted:
        kernels.quant_linear_fwd(x, *weight, None)
        kernels.quant_linear_bwd(dy, *weight)
    assert sorted({name.split("<")[0] for name in counted}) == names


def test_splits_are_few_and_long(machine):
    """None for one block's work or where all multiprocessors are busy, else blocks for most."""
    assert machine.plan(1, 64, 256, False).splits == 1
    assert machine.plan(512, 27392, 4096, False).splits == 1
    for tokens in (1, 64, 192, 512):
        for n, k in ((4608, 4096), (27392, 4096), (4096, 13696)):
            for backward in (False, True):
                plan = machine.plan(tokens, n, k, backward)
                assert plan.splits == 1 or plan.steps // plan.splits >= 2
                assert plan.blocks >= 96


def test_turing_has_no_products_of_bfloat16(kernels, machine):
    x = torch.ones(9, 32).bfloat16()
    with machine.code_version(75), machine.counting() as counted:
        kernels.quant_linear_fwd(x, *quantized(4, 32, 4), None)
    assert [name.split("<")[0] for name in counted] == ["dequantize_kernel"]


def test_a_variant_that_cannot_serve_says_so(kernels, machine):
    sentence = "quant_linear: the gemv takes codes and up to 8 rows of float32"
    with machine.variant("gemv"), pytest.raises(RuntimeError, match=sentence):
        kernels.quant_linear_fwd(torch.ones(1, 32).half(), *quantized(4, 32, 4), None)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_nothing_to_add_up(kernels, bits):
    """No columns: the bias alone; no rows: zeros; and no results at all."""
    weight = torch.empty(5, 0).half() if bits == 16 else torch.empty(5, 0, dtype=torch.int8)
    scale, bias = None if bits == 16 else torch.ones(5), torch.randn(5)
    for m in (3, 17):
        y = kernels.quant_linear_fwd(torch.empty(m, 0), weight, scale, bits, bias)
        assert y.equal(bias.expand(m, 5))
        assert kernels.quant_linear_bwd(torch.ones(m, 5), weight, scale, bits).shape == (m, 0)
        none = weight[:0].new_empty(0, 4), None if scale is None else scale[:0], bits
        dx = kernels.quant_linear_bwd(torch.empty(m, 0), *none)
        assert dx.equal(torch.zeros(m, 8 if bits == 4 else 4))
