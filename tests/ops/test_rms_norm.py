"""rms_norm and add_rms_norm, reference and C++: numbers, registration, determinism, errors."""

import pytest
import torch

import glmkern
from glmkern import ops
from tests.ops import formulas
from tests.ops.formulas import add_rms_norm_inputs, rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "rms_norm_fwd"
SHAPES = [(1, 1), (63, 1), (3, 3), (1, 17), (63, 64), (2, 3, 100), (3, 4096), (5, 4099), (100, 17)]


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
    assert same_bits(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(12))


def test_inputs_with_strides(backend):
    x, residual, weight = torch.randn(6, 10), torch.randn(6, 10), torch.randn(10)
    expected = ops.add_rms_norm(x.t().contiguous(), residual.t().contiguous(), weight[:6])
    result = ops.add_rms_norm(x.t(), residual.t(), weight[:6])
    assert all(map(same_bits, result, expected))


def test_float64():
    inputs = [t.double() for t in add_rms_norm_inputs((4, 7), torch.float32)]
    assert torch.autograd.gradcheck(ops.add_rms_norm, [t.detach().requires_grad_() for t in inputs])
    with (
        pytest.raises(
            RuntimeError,
            match="'cpu' is forced, but cannot serve rms_norm_fwd: float64 has no kernel",
        ),
        glmkern.backend("cpu"),
    ):
        ops.rms_norm(inputs[0], inputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_survives_and_sums_round_to_even(dtype):
    """The kernel's own conversions, met through h: all values, ties, overflow and subnormals."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()].unsqueeze(0)
    weight = torch.ones(every.shape[1], dtype=dtype)
    for other in (torch.zeros_like(every), every.flip(1), every / 2, every.roll(1, 1)):
        with glmkern.backend("cpu"):
            h = ops.add_rms_norm(every, other, weight)[1]
        expected = every + other
        assert same_bits(h.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert h.isnan().equal(expected.isnan())


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 65), (63, 4099), (3, 4096)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(threads, shape, dtype):
    inputs = add_rms_norm_inputs(shape, dtype)
    upstream = [torch.randn(shape).to(dtype) for _ in range(2)]

    def run(count):
        threads(count)
        with poisoned_memory(), glmkern.backend("cpu"):
            outputs = ops.add_rms_norm(*inputs)
            return outputs + torch.autograd.grad(outputs, inputs, upstream)

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


def test_a_large_output_has_the_bits_of_its_pieces():
    """Outputs beyond the caches are stored past them, by other instructions."""
    x, residual, weight = torch.randn(1100, 4096), torch.randn(1100, 4096), torch.randn(4096)
    with glmkern.backend("cpu"), poisoned_memory():
        whole = torch.ops.glmkern.add_rms_norm_fwd(x, residual, weight, 1e-5)
        parts = [
            torch.ops.glmkern.add_rms_norm_fwd(a, b, weight, 1e-5)
            for a, b in zip(x.split(100), residual.split(100), strict=True)
        ]
        bwd = torch.ops.glmkern.rms_norm_bwd
        dx = bwd(residual, x, weight, whole[2], None, False)[0]
        dx_parts = [
            bwd(b, a, weight, part[2], None, False)[0]
            for a, b, part in zip(x.split(100), residual.split(100), parts, strict=True)
        ]
    assert all(
        same_bits(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True)
    )
    assert same_bits(dx, torch.cat(dx_parts))


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


@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (0, torch.zeros(2, 8), "dy must have 24 elements, not 16"),
        (1, torch.zeros(8, 3).t(), "x is not contiguous"),
        (2, torch.zeros(8).half(), "weight has another dtype"),
        (3, torch.zeros(4), "rstd must have 3 elements, not 4"),
        (4, torch.zeros(3, 7), "dresidual must have 24 elements, not 21"),
    ],
)
def test_the_kernels_guard_direct_calls(position, wrong, sentence):
    glmkern.backends("cpu")
    arguments = [torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8), torch.zeros(3), None, True]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=f"^rms_norm_bwd: {sentence}$"):
        torch.ops.glmkern_cpu.rms_norm_bwd(*arguments)
