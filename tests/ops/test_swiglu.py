"""swiglu: numbers, layouts, errors."""

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from tests.backends import slow
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

OP = "swiglu_fwd"
# widths of one element, of less than a vector, of half a tile, of exactly one, of two and of more;
# tiles whose last rows are missing
SHAPES = [
    (2,),
    (1, 2),
    (3, 34),
    (17, 66),
    (2, 3, 200),
    (9, 1024),
    (3, 2048),
    (5, 2742),
    (1, 27392),
    slow((63, 1370)),
]


def formula(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(backend, shape, dtype):
    matches_fp64(ops.swiglu, formula, lambda: [(3 * torch.randn(shape)).to(dtype).requires_grad_()])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gates_far_from_zero(backend, dtype):
    """exp's range ends at 88: sigmoid is 0, as far as float32 shows it, or 1 there."""
    gate = torch.tensor([-1e4, -200.0, -89.0, -87.5, -80.0, -20.0, -0.0, 0.0, 20.0, 80.0, 200.0])
    x = torch.cat([gate, torch.ones(len(gate))]).to(dtype).requires_grad_()
    matches_fp64(ops.swiglu, formula, [x])
    assert ops.swiglu(x)[-1] == 200


def test_no_elements(backend):
    for shape in ((0, 6), (3, 0)):
        x = torch.randn(shape, requires_grad=True)
        y = ops.swiglu(x)
        assert y.shape == (shape[0], shape[1] // 2)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_inputs_with_strides(backend):
    x = torch.randn(6, 10).t()
    assert same_bits(ops.swiglu(x), ops.swiglu(x.contiguous()))


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.tensor(1.0)])
def test_odd_width(x):
    with pytest.raises(ValueError, match="gate and up, two halves of one size"):
        ops.swiglu(x)


def test_wrong_dtype():
    with pytest.raises(ValueError, match="x must be float32, float16, bfloat16 or float64"):
        ops.swiglu(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    x = torch.ones(2, 8).double()
    sentence = f"'{backend.name}' is forced, but cannot serve swiglu_fwd: float64 has no kernel"
    with pytest.raises(RuntimeError, match=sentence):
        ops.swiglu(x)
