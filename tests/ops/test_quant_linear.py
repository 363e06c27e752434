"""The official 4- and 8-bit format, and linear layers over it."""

import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import glmkern
from glmkern import ops
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

# The package's attribute of that name is the function.
module = sys.modules["glmkern.ops.quant_linear"]

OP = "quant_linear_fwd"
SHAPES = [
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
]  # M, N, K
FLOATING = {16: torch.float16, 32: torch.float32}  # a dense weight's dtype by its bits


def test_known_nibbles():
    weight = torch.tensor([[7.0, -7.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    qweight = ops.quantize(weight, 4)
    assert qweight.packed.tolist() == [[0x79, 0x30], [0, 0]]
    assert qweight.scale.tolist() == [1.0, 0.0]
    assert torch.equal(ops.dequantize(qweight, torch.float32), weight)


@pytest.mark.parametrize("file", ["linear_fp16", "linear_fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_official_record(backend, golden, file, bits):
    recorded = load_file(golden / "quant" / f"{file}.safetensors")
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
    qweight = ops.quantize((torch.randn(n, k) * 0.02).half(), bits)
    matches_fp64(
        lambda x, b: ops.quant_linear(x, qweight, b),
        lambda x, b: F.linear(x, ops.dequantize(qweight, x.dtype), b),
        lambda: inputs(m, n, k, dtype),
    )


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
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 17, 33), (1, 9, 131)])
def test_dense_against_fp64(backend, m, n, k, dtype, stored):
    weight = (torch.randn(n, k) * 0.02).to(stored)
    matches_fp64(
        lambda x, b: ops.quant_linear(x, weight, b),
        lambda x, b: F.linear(x, weight.to(x.dtype), b),
        lambda: inputs(m, n, k, dtype),
    )


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
@pytest.mark.parametrize("m", [1, 2, 15])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(backend, value, m, dtype):
    weight = torch.tensor([[1.0, -3.0, 7.0, 0.0], [0.0, -7.0, 0.0, 2.0]])
    x = torch.ones(m, 4, dtype=dtype)
    x[m // 2, 1] = value
    expected = F.linear(x.float(), weight).to(dtype)
    torch.testing.assert_close(
        ops.quant_linear(x, ops.quantize(weight)), expected, equal_nan=True, rtol=0, atol=0
    )


def inputs(m, n, k, dtype):
    """x and bias."""
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in ((m, k), (n,))]


@pytest.mark.parametrize("k", [260, 6402])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(threads, dtype, bits, k):
    weight = torch.randn(301, k)
    packed, scale, bits = (
        ops.quantize(weight, bits) if bits <= 8 else (weight.to(FLOATING[bits]), None, bits)
    )
    tensors = {
        m: (torch.randn(m, k).to(dtype), torch.randn(m, 301).to(dtype)) for m in (1, 3, 15, 300)
    }

    def run(count):
        threads(count)
        with poisoned_memory(), glmkern.backend("cpu"):
            return [
                y
                for x, dy in tensors.values()
                for y in (
                    torch.ops.glmkern.quant_linear_fwd(x, packed, scale, bits, None),
                    torch.ops.glmkern.quant_linear_bwd(dy, packed, scale, bits),
                )
            ]

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


def test_rows_do_not_depend_on_each_other():
    """A row's result has the same bits in a batch of 300 as in one of 20, and backward alone."""
    qweight = ops.quantize(torch.randn(150, 200))
    x, dy = torch.randn(300, 200), torch.randn(300, 150)
    with glmkern.backend("cpu"):
        y = torch.ops.glmkern.quant_linear_fwd(x, *qweight, None)
        assert same_bits(y[80:100], torch.ops.glmkern.quant_linear_fwd(x[80:100], *qweight, None))
        dx = torch.ops.glmkern.quant_linear_bwd(dy, *qweight)
        assert same_bits(dx[7:8], torch.ops.glmkern.quant_linear_bwd(dy[7:8], *qweight))


def test_gradients_far_below_the_smallest_half():
    """The scale is multiplied in float32: dy * scale in half would underflow."""
    qweight = ops.quantize((torch.randn(64, 128) * 0.02).half())
    dy = (torch.randn(5, 64) * 1e-5).half()
    with glmkern.backend("cpu"):
        dx = torch.ops.glmkern.quant_linear_bwd(dy, *qweight)
    exact = dy.double() @ ops.dequantize(qweight, torch.float64)
    assert (dx.double() - exact).abs().max() <= 2**-25  # half a subnormal's step


@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_leading_dimensions(backend, lead):
    qweight = ops.quantize(torch.randn(5, 8))
    x = torch.randn(*lead, 8)
    expected = F.linear(x, ops.dequantize(qweight, torch.float32))
    torch.testing.assert_close(ops.quant_linear(x, qweight), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_dequantising(bits):
    qweight = ops.quantize(torch.randn(9, 34), bits)
    again = ops.quantize(ops.dequantize(qweight, torch.float32), bits)
    assert same_bits(again.packed, qweight.packed)
    assert qweight.shape == (9, 34)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1e-4)], ids=str)
def test_a_rounded_scale_does_not_wrap_a_code(bits, dtype, size):
    weight = (torch.randn(2000, 64) * size).to(dtype)
    result = ops.dequantize(ops.quantize(weight, bits), torch.float32)
    assert (result * weight >= 0).all()


def test_quantising_keeps_no_graph():
    weight = torch.nn.Linear(8, 3).weight
    qweight = ops.quantize(weight)
    assert weight.requires_grad and not qweight.scale.requires_grad


@pytest.mark.parametrize(
    ("weight", "bits", "sentence"),
    [
        (torch.zeros(2, 4), 3, "bits must be 4 or 8, not 3"),
        (torch.zeros(4), 4, r"weight must be \[N, K\]"),
        (torch.zeros(2, 3), 4, "K must be even, not 3"),
        (torch.tensor([[1.0, 2.0], [1.0, float("nan")]]), 8, "row 1 of the weight holds NaN"),
    ],
)
def test_quantize_errors(weight, bits, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.quantize(weight, bits)


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


@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (0, torch.zeros(2, 7), "x's last dimension must be 8"),
        (1, torch.zeros(8, 5, dtype=torch.int8).t(), "the packed weight is not contiguous"),
        (1, torch.zeros(5, 8, dtype=torch.int32), "serves weights of int8 codes"),
        (2, torch.zeros(4), "scale must have 5 elements, not 4"),
        (2, None, "codes need their scale"),
        (4, torch.zeros(4), "bias must have 5 elements, not 4"),
    ],
)
def test_the_kernels_guard_direct_calls(position, wrong, sentence):
    glmkern.backends("cpu")
    call = [torch.zeros(2, 8), torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5), 8, None]
    call[position] = wrong
    with pytest.raises(
        RuntimeError, match=f"^quant_linear_fwd.* {sentence}|^quant_linear_fwd {sentence}"
    ):
        torch.ops.glmkern_cpu.quant_linear_fwd(*call)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_in_blocks_changes_no_bit(bits, monkeypatch):
    weight = torch.randn(13, 10).half()
    weight[3] = 0
    whole = ops.quantize(weight, bits)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)
    blocks = ops.quantize(weight, bits)
    assert all(map(same_bits, whole[:2], blocks[:2]))
    assert not torch.signbit(whole.scale).any()
