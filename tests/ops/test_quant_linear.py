"""Linear layers over a dense weight or one of the official 4- and 8-bit format: numbers, layouts,
errors."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from glmkern import ops
from tests.backends import slow
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

OP = "quant_linear_fwd"
SHAPES = [
    (1, 37, 70),
    (3, 51, 66),
    (17, 70, 136),
    *(
        slow(*shape)
        for shape in [
            (1, 1, 2),
            (1, 140, 1030),
            (2, 35, 66),
            (3, 5, 8),
            (4, 129, 300),
            (15, 131, 258),
            (17, 33, 100),
            (63, 7, 514),
            (192, 70, 136),
            (511, 37, 130),
            (1, 5, 6290),
            (3, 7, 2306),
        ]
    ),
]  # M, N, K
DENSE_SHAPES = [(1, 51, 131), (17, 51, 70), *SHAPES[3:], slow(5, 17, 33), slow(1, 9, 131)]


def quantized(n, k, bits=4, dtype=torch.float16):
    return ops.quantize((torch.randn(n, k) * 0.02).to(dtype), bits)


def inputs(m, n, k, dtype):
    """x and bias."""
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((m, k), (n,))]


def check(m, n, k, dtype, qweight):
    matches_fp64(
        lambda x, b: ops.quant_linear(x, qweight, b),
        lambda x, b: F.linear(x, ops.dequantize(qweight, x.dtype), b),
        lambda: inputs(m, n, k, dtype),
    )


def check_dense(m, n, k, dtype, weight):
    matches_fp64(
        lambda x, b: ops.quant_linear(x, weight, b),
        lambda x, b: F.linear(x, weight.to(x.dtype), b),
        lambda: inputs(m, n, k, dtype),
    )


@pytest.mark.parametrize("file", ["linear_fp16", "linear_fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_official_record(backend, golden, file, bits):
    recorded = load_file(golden / "quant" / f"{file}.safetensors", device=backend.device)
    qweight = ops.quantize(recorded["weight"], bits)
    assert same_bits(qweight.packed, recorded["packed4" if bits == 4 else "q8"])
    assert same_bits(qweight.scale, recorded[f"scale{bits}"])
    if file == "linear_fp16":
        assert same_bits(ops.dequantize(qweight, torch.float16), recorded[f"dequant{bits}_half"])
    assert same_bits(ops.dequantize(qweight, torch.float32), recorded[f"dequant{bits}_fp32scale"])

    x = recorded["x"].requires_grad_()
    y = ops.quant_linear(x, qweight)
    y.square().sum().backward()
    for ours, name in ((y, f"y{bits}"), (x.grad, f"dx{bits}_of_sum_y2")):
        error = (ours - recorded[name]).abs().max() / recorded[name].abs().max()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_fp64(backend, m, n, k, dtype, bits):
    check(m, n, k, dtype, quantized(n, k, bits))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("m", [1, 7, slow(33)])
def test_scale_of_another_dtype(backend, m, dtype, scale_dtype):
    check(m, 51, 66, dtype, quantized(51, 66, dtype=scale_dtype))


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
@pytest.mark.parametrize(("m", "n", "k"), DENSE_SHAPES)
def test_dense_against_fp64(backend, m, n, k, dtype, stored):
    check_dense(m, n, k, dtype, (torch.randn(n, k) * 0.02).to(stored))


@pytest.mark.slow_when_emulated  # a matter of the C++ kernels
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("size", [2.0**-20, 1.0, 2.0**10, "outlier", "zero"])
@pytest.mark.parametrize("k", [4098, 66000])
def test_one_row_of_any_size(backend, k, size, dtype):
    """A single row goes through fixed point up to 65,536 columns."""
    qweight = ops.quantize(torch.randn(21, k) / k**0.5)
    x = torch.randn(1, k) * (size if isinstance(size, float) else 1)
    if size == "outlier":
        x[0, k // 3] = 1000
    if size == "zero":
        x.zero_()
    matches_fp64(
        lambda x: ops.quant_linear(x, qweight),
        lambda x: F.linear(x, ops.dequantize(qweight, x.dtype)),
        lambda: [x.to(dtype).requires_grad_()],
    )


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_one_row_at_the_ends_of_float32(backend, size):
    qweight = ops.quantize(torch.randn(5, 300))
    x = torch.randn(1, 300)
    assert same_bits(ops.quant_linear(x * size, qweight), ops.quant_linear(x, qweight) * size)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("m", [1, 2, 5, 15])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(backend, value, m, dtype):
    weight = torch.tensor([[1.0, -3.0, 7.0, 0.0], [0.0, -7.0, 0.0, 2.0]])
    x = torch.ones(m, 4, dtype=dtype)
    x[m // 2, 1] = value
    expected = F.linear(x.float(), weight).to(dtype)
    torch.testing.assert_close(
        ops.quant_linear(x, ops.quantize(weight)), expected, equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.backends("cpu", "triton", "cuda")
def test_gradients_far_below_the_smallest_half(backend):
    """The scale is multiplied in float32: dy * scale in half would underflow."""
    qweight = quantized(64, 128)
    dy = (torch.randn(5, 64) * 1e-5).half()
    dx = torch.ops.glmkern.quant_linear_bwd(dy, *qweight)
    exact = dy.double() @ ops.dequantize(qweight, torch.float64)
    assert (dx.double() - exact).abs().max() <= 2**-25  # half a subnormal's step


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_leading_dimensions_and_no_rows(backend, lead, bits):
    qweight = ops.quantize(torch.randn(5, 8), bits) if bits <= 8 else torch.randn(5, 8)
    dense = ops.dequantize(qweight, torch.float32) if bits <= 8 else qweight
    x = torch.randn(*lead, 8).requires_grad_()
    y = ops.quant_linear(x, qweight)
    dy = torch.randn(y.shape)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y, F.linear(x, dense))
    torch.testing.assert_close(dx, dy @ dense)
    assert y.is_contiguous() and dx.is_contiguous()


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    sentence = f"'{backend.name}' is forced, but cannot serve quant_linear_fwd: float64"
    with pytest.raises(RuntimeError, match=sentence):
        ops.quant_linear(torch.ones(2, 8).double(), quantized(2, 8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(x=torch.zeros(3, 7)), "must be the weight's K = 8"),
        (dict(scale=torch.zeros(5, 2)), r"grouped scales \[5, 2\] are not supported"),
        (dict(scale=torch.zeros(4)), r"scale must have shape \[5\]"),
        (dict(packed=torch.zeros(5, 4)), "packed must be int8"),
        (dict(bits=2), "bits must be 4 or 8, not 2"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \[5\]"),
    ],
)
def test_linear_errors(change, sentence):
    call = (
        dict(
            x=torch.zeros(3, 8),
            packed=torch.zeros(5, 4, dtype=torch.int8),
            scale=torch.zeros(5),
            bits=4,
            bias=None,
        )
        | change
    )
    with pytest.raises(ValueError, match=sentence):
        ops.quant_linear(
            call["x"],
            ops.QuantizedWeight(call["packed"], call["scale"], call["bits"]),
            call["bias"],
        )


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (
            torch.zeros(5, 8, dtype=torch.float64),
            "must have x's dtype or a narrower one, but it is ",
        ),
        (torch.zeros(5, 8, dtype=torch.int64), "must have x's dtype or a narrower one"),
        (torch.zeros(8), r"a dense weight must be \[N, K\], not \[8\]"),
        (torch.zeros(5, 8, requires_grad=True), "pass weight.detach"),
        (torch.zeros(5, 7), "must be the weight's K = 7"),
    ],
)
def test_dense_errors(weight, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.quant_linear(torch.zeros(3, 8), weight)


def check_swiglu(m, n, k, dtype, qweight):
    """Of gates, the first half of the rows, and ups."""

    def formula(x, bias):
        gate, up = F.linear(x, ops.dequantize(qweight, x.dtype), bias).chunk(2, -1)
        return F.silu(gate) * up

    matches_fp64(
        lambda x, bias: torch.ops.glmkern.quant_linear_swiglu_fwd(x, *qweight, bias),
        formula,
        lambda: [x.detach() * 20 for x in inputs(m, n, k, dtype)],
    )


# One token, a few with and without splits of the reduction, and many.
SWIGLU_SHAPES = [(1, 38, 70), (3, 52, 66), (17, 70, 136), (2, 6, 2306), slow(520, 38, 130)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SWIGLU_SHAPES)
def test_swiglu_of_a_product(backend, m, n, k, dtype, bits):
    check_swiglu(m, n, k, dtype, quantized(n, k, bits))


def test_swiglu_of_a_dense_weight_and_of_no_rows(backend):
    weight, x = torch.randn(8, 6).half(), torch.randn(3, 6)
    kernel = torch.ops.glmkern.quant_linear_swiglu_fwd
    expected = ops.swiglu(ops.quant_linear(x, weight))
    torch.testing.assert_close(kernel(x, weight, None, 16, None), expected)
    assert kernel(x[:0], *quantized(8, 6), None).shape == (0, 4)
    assert kernel(x.view(3, 1, 6), *quantized(8, 6), None).shape == (3, 1, 4)
