"""The official 4- and 8-bit format: quantize and dequantize."""

import sys

import pytest
import torch

from glmkern import ops
from tests.ops.numerics import same_bits

# The package's attribute of that name is the function.
module = sys.modules["glmkern.ops.quant_linear"]


def test_known_nibbles():
    weight = torch.tensor([[7.0, -7.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    qweight = ops.quantize(weight, 4)
    assert qweight.packed.tolist() == [[0x79, 0x30], [0, 0]]
    assert qweight.scale.tolist() == [1.0, 0.0]
    assert torch.equal(ops.dequantize(qweight, torch.float32), weight)


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


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_in_blocks_changes_no_bit(bits, monkeypatch):
    weight = torch.randn(13, 10).half()
    weight[3] = 0
    whole = ops.quantize(weight, bits)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)
    blocks = ops.quantize(weight, bits)
    assert all(map(same_bits, whole[:2], blocks[:2]))
    assert not torch.signbit(whole.scale).any()
