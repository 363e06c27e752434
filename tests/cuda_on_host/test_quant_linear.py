"""The CUDA kernels of quant_linear on the CPU, beyond the tests that all backends share: every
template instance and variant, slabs, splits, narrow rows, unaligned tensors."""

import os

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from tests.cuda_on_host.library import build
from tests.cuda_on_host.machine import Machine
from tests.cuda_on_host.sanitized import (
    SANITIZED,
    assert_sanitizers_find_nothing,
    load_kernels,
    unaligned,
)
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels():
    return load_kernels()


@pytest.fixture(scope="module")
def machine(kernels):
    return Machine(build(sanitize=SANITIZED in os.environ))


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


def test_gemv_wastes_no_memory_access(kernels, machine):
    """Without conflicts in shared memory; x's chunks are the only reads that are repeated."""
    qweight = quantized(16, 1024, 4)
    with machine.counting() as counted:
        kernels.quant_linear_fwd(torch.randn(2, 1024), *qweight, None)
        kernels.quant_linear_bwd(torch.randn(2, 16), *qweight)
    forward, backward = (kernel for _, kernel in sorted(counted.items(), reverse=True))
    assert forward.conflicts == 0
    assert forward.useful > 0.9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "l2"),
    [(1, 36, 34, 2**9), (9, 70, 136, 2**13), (17, 300, 320, 2**18), (5, 1, 2, 1)],
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
    for l2 in (2**11, 2**17, 2**22):
        with machine.variant("slab"), machine.l2_cache(l2), poisoned_memory():
            y = kernels.quant_linear_fwd(torch.eye(k, dtype=dtype), *stored, None)
            dx = kernels.quant_linear_bwd(torch.eye(n, dtype=dtype), *stored)
        assert y.equal(weight.T) and dx.equal(weight)


@pytest.mark.parametrize("stored", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("m", [1, 9])
def test_dense_weights_of_any_dtype(kernels, machine, m, dtype, stored):
    weight = torch.randn(50, 34).to(stored)
    with machine.l2_cache(2**11):
        matches_fp64(
            differentiable(kernels, (weight, None, 8 * weight.element_size())),
            lambda x, b: F.linear(x, weight.to(dtype).to(x.dtype), b),
            lambda: [torch.randn(s).to(dtype).requires_grad_() for s in ((m, 34), (50,))],
        )


@pytest.mark.parametrize("variant", ["gemv", "slab"])
@pytest.mark.parametrize("bits", [4, 8])
def test_same_bits_in_any_order_of_threads(kernels, machine, bits, variant):
    qweight = quantized(600, 1088, bits)
    x, dy, bias = torch.randn(3, 1088), torch.randn(3, 600), torch.randn(600)

    def run(seed):
        with machine.seed(seed), machine.variant(variant), poisoned_memory():
            y = kernels.quant_linear_fwd(x, *qweight, bias)
            return y, kernels.quant_linear_bwd(dy, *qweight)

    assert all(map(same_bits, run(1), run(2)))


@pytest.mark.parametrize(
    ("m", "dtype", "bits", "names"),
    [
        (8, torch.float32, 4, {"gemv_forward_kernel", "gemv_backward_kernel"}),
        (8, torch.float32, 8, {"gemv_forward_kernel", "gemv_backward_kernel"}),
        (9, torch.float32, 4, {"dequantize_kernel"}),
        (1, torch.float32, 16, set()),
    ],
    ids=str,
)
def test_choice(kernels, machine, m, dtype, bits, names):
    weight = quantized(4, 32, bits) if bits <= 8 else (torch.randn(4, 32).half(), None, bits)
    x, dy = (torch.ones(m, size, dtype=dtype) for size in (32, 4))
    with machine.counting() as counted:
        kernels.quant_linear_fwd(x, *weight, None)
        kernels.quant_linear_bwd(dy, *weight)
    assert {name.split("<")[0] for name in counted} == names


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


SANITIZED_SHAPES = [(m, n, k) for m in (1, 7) for n, k in ((37, 1088), (300, 34), (1, 2))]


@pytest.mark.parametrize(("m", "n", "k"), SANITIZED_SHAPES)
def test_results_are_finite(kernels, machine, m, n, k):
    """What the next test runs under the sanitizers."""
    variants = [("gemv", torch.float32), *(("slab", dtype) for dtype in HALF_AND_SINGLE)]
    for bits, place in ((4, torch.Tensor.clone), (8, torch.Tensor.clone), (4, unaligned)):
        packed, scale, _ = quantized(n, k, bits)
        for variant, dtype in variants:
            x, dy, bias = (place(torch.randn(s).to(dtype)) for s in ((m, k), (m, n), (n,)))
            weight = place(packed), place(scale), bits
            with machine.variant(variant), machine.l2_cache(2**16), poisoned_memory():
                y = kernels.quant_linear_fwd(x, *weight, bias)
                dx = kernels.quant_linear_bwd(dy, *weight)
            assert y.isfinite().all() and dx.isfinite().all()


def test_sanitizers_find_nothing():
    assert_sanitizers_find_nothing(__file__, [test_results_are_finite], len(SANITIZED_SHAPES))
