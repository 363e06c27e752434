"""The official 4- and 8-bit format, and linear layers over it."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from glmkern import ops
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

SHAPES = [(1, 1, 2), (3, 5, 8), (17, 33, 100), (63, 7, 514)]  # M, N, K


def test_known_nibbles():
    weight = torch.tensor([[7.0, -7.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    qweight = ops.quantize(weight, 4)
    assert qweight.packed.tolist() == [[0x79, 0x30], [0, 0]]
    assert qweight.scale.tolist() == [1.0, 0.0]
    assert torch.equal(ops.dequantize(qweight, torch.float32), weight)


@pytest.mark.parametrize("file", ["linear_fp16", "linear_fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_official_record(golden, file, bits):
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
def test_against_fp64(m, n, k, dtype, bits):
    qweight = ops.quantize((torch.randn(n, k) * 0.02).half(), bits)

    def formula(x, bias):
        return F.linear(x, ops.dequantize(qweight, x.dtype), bias)

    matches_fp64(lambda x, b: ops.quant_linear(x, qweight, b), formula,
                 lambda: [torch.randn(s).to(dtype).requires_grad_() for s in ((m, k), (n,))])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_dequantising(bits):
    qweight = ops.quantize(torch.randn(9, 34), bits)
    again = ops.quantize(ops.dequantize(qweight, torch.float32), bits)
    assert same_bits(again.packed, qweight.packed)
    assert qweight.shape == (9, 34)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1e-4)],
                         ids=str)
def test_a_rounded_scale_does_not_wrap_a_code(bits, dtype, size):
    weight = (torch.randn(2000, 64) * size).to(dtype)
    result = ops.dequantize(ops.quantize(weight, bits), torch.float32)
    assert (result * weight >= 0).all()


def test_quantising_keeps_no_graph():
    weight = torch.nn.Linear(8, 3).weight
    qweight = ops.quantize(weight)
    assert weight.requires_grad and not qweight.scale.requires_grad


def test_registration():
    packed, scale, bits = ops.quantize(torch.randn(5, 8))
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    check_registration(torch.ops.glmkern.quant_linear_fwd.default, (x, packed, scale, bits, bias))
    check_registration(torch.ops.glmkern.quant_linear_bwd.default,
                       (torch.randn(3, 5), packed, scale, bits))
    check_compiles(
        lambda x, b: ops.quant_linear(x, ops.QuantizedWeight(packed, scale, bits), b),
        [[torch.randn(n, 8, requires_grad=True), bias] for n in (3, 6)])


@pytest.mark.parametrize(("weight", "bits", "sentence"), [
    (torch.zeros(2, 4), 3, "bits must be 4 or 8, not 3"),
    (torch.zeros(4), 4, r"weight must be \[N, K\]"),
    (torch.zeros(2, 3), 4, "K must be even, not 3"),
    (torch.tensor([[1.0, 2.0], [1.0, float("nan")]]), 8, "row 1 of the weight holds NaN"),
])
def test_quantize_errors(weight, bits, sentence):
    with pytest.raises(ValueError, match=sentence):
        ops.quantize(weight, bits)


@pytest.mark.parametrize(("change", "sentence"), [
    (dict(x=torch.zeros(3, 7)), "must be the weight's K = 8"),
    (dict(scale=torch.zeros(5, 2)), r"grouped scales \[5, 2\] are not supported"),
    (dict(scale=torch.zeros(4)), r"scale must have shape \[5\]"),
    (dict(packed=torch.zeros(5, 4)), "packed must be int8"),
    (dict(bits=2), "bits must be 4 or 8, not 2"),
    (dict(bias=torch.zeros(4)), r"bias must have shape \[5\]"),
])
def test_linear_errors(change, sentence):
    call = dict(x=torch.zeros(3, 8), packed=torch.zeros(5, 4, dtype=torch.int8),
                scale=torch.zeros(5), bits=4, bias=None) | change
    with pytest.raises(ValueError, match=sentence):
        ops.quant_linear(call["x"], ops.QuantizedWeight(call["packed"], call["scale"],
                                                        call["bits"]), call["bias"])
