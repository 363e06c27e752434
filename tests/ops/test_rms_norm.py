"""rms_norm and add_rms_norm: numbers, layouts, errors."""

import pytest
import torch

from glmkern import ops
from tests.backends import slow
from tests.ops import formulas
from tests.ops.formulas import add_rms_norm_inputs, rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

OP = "rms_norm_fwd"
# rows of less than a vector, of odd length, of exactly one block, of half a block, of five blocks
SHAPES = [
    (1, 1),
    (3, 3),
    (1, 17),
    (63, 17),
    (63, 100),
    (2, 3, 100),
    (3, 4096),
    (1, 4099),
    (3, 8200),
    *map(slow, [(63, 1), (63, 64), (100, 17), (5, 4099), (300, 4096), (3, 13696)]),
]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(backend, shape, dtype):
    matches_fp64(ops.rms_norm, formulas.rms_norm, lambda: rms_norm_inputs(shape, dtype))
    matches_fp64(ops.add_rms_norm, formulas.add_rms_norm, lambda: add_rms_norm_inputs(shape, dtype))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
def test_eps(backend, eps):
    """Rows whose mean square is far below, near and far above eps."""
    scale = torch.tensor([1e-6, 1e-3, 1.0, 1e3]).unsqueeze(1)
    matches_fp64(
        lambda x, w: ops.rms_norm(x, w, eps),
        lambda x, w: formulas.rms_norm(x, w, eps),
        lambda: [(torch.randn(4, 100) * scale).requires_grad_(), torch.randn(100).requires_grad_()],
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(63, 100), (2, 8200)], ids=str)
def test_sum_is_rounded_before_it_is_normalised(backend, shape, dtype):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1:]).to(dtype)
    y, h = ops.add_rms_norm(x, residual, weight)
    assert same_bits(h, x + residual)
    assert same_bits(y, ops.rms_norm(h, weight))


def test_the_gradient_of_a_frozen_weight_is_not_computed(backend):
    x, weight = rms_norm_inputs((5, 12), torch.float32)
    weight = weight.detach()
    y = ops.rms_norm(x, weight)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    rstd = torch.ops.glmkern.rms_norm_fwd(x.detach(), weight, 1e-5)[1]
    bwd = torch.ops.glmkern.rms_norm_bwd
    for dresidual in (None, torch.zeros_like(dx)):
        for weight_grad, numel in ((False, 0), (True, 12)):
            again, dweight = bwd(
                torch.ones_like(y), x.detach(), weight, rstd, dresidual, weight_grad
            )
            assert same_bits(again, dx) and dweight.numel() == numel


def test_no_rows(backend):
    x, residual, weight = add_rms_norm_inputs((2, 0, 12), torch.float32)
    y, h = ops.add_rms_norm(x, residual, weight)
    assert y.shape == h.shape == (2, 0, 12)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == (2, 0, 12)
    assert same_bits(dweight, torch.zeros(12))


def test_zero_row(backend):
    """eps alone is under the root."""
    x, weight = torch.zeros(1, 100), torch.ones(100)
    y, rstd = torch.ops.glmkern.rms_norm_fwd(x, weight, 1e-6)
    assert torch.equal(y, x)
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3), rtol=1e-6, atol=0)


def test_inputs_with_strides(backend):
    x, residual, weight = torch.randn(6, 10), torch.randn(6, 10), torch.randn(10)
    expected = ops.add_rms_norm(x.t().contiguous(), residual.t().contiguous(), weight[:6])
    result = ops.add_rms_norm(x.t(), residual.t(), weight[:6])
    assert all(map(same_bits, result, expected))


@pytest.mark.backends("reference")
def test_float64(backend):
    inputs = [t.double() for t in add_rms_norm_inputs((4, 7), torch.float32)]
    assert torch.autograd.gradcheck(ops.add_rms_norm, [t.detach().requires_grad_() for t in inputs])


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    x, weight = torch.ones(2, 8).double(), torch.ones(8).double()
    sentence = f"'{backend.name}' is forced, but cannot serve rms_norm_fwd: float64 has no kernel"
    with pytest.raises(RuntimeError, match=sentence):
        ops.rms_norm(x, weight)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(x=torch.zeros(3, 8, dtype=torch.int32)), "x must be float32, .* not int32"),
        (dict(x=torch.tensor(1.0)), r"weight must have shape \[H\]"),
        (dict(weight=torch.zeros(7)), r"weight must have shape \[8\], .* not \[7\]"),
        (dict(weight=torch.zeros(8).half()), "weight is float16 but x is float32"),
        (dict(weight=torch.zeros(8, device="meta")), "weight is on meta but x is on cpu"),
        (
            dict(x=torch.zeros(3, 0), weight=torch.zeros(0)),
            r"last dimension is empty, x is \(3, 0\)",
        ),
        (dict(eps=0.0), "eps must be positive, not 0.0"),
    ],
)
def test_errors(arguments, sentence):
    arguments = dict(x=torch.zeros(3, 8), weight=torch.zeros(8)) | arguments
    with pytest.raises(ValueError, match=f"^rms_norm: .*{sentence}"):
        ops.rms_norm(**arguments)


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"residual must have x's shape \(3, 8\), not \(8,\)"):
        ops.add_rms_norm(torch.zeros(3, 8), torch.zeros(8), torch.zeros(8))
