"""csrc/cuda/rms_norm.cu on the CPU: every dtype, every way of covering a row, odd shapes."""

import pytest
import torch

from tests.cuda_on_host.host import HERE, compile_program, run
from tests.ops import formulas
from tests.ops.formulas import add_rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

EPS = 1e-5


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program(HERE / "rms_norm.cpp", ["rms_norm"], tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return compile_program(
        HERE / "rms_norm.cpp", ["rms_norm"], tmp_path_factory.mktemp("host"), sanitize=True
    )


def forward(program, x, residual, weight, offset=0):
    """(y, h, rstd); h is empty without a residual."""
    inputs = [x, weight] if residual is None else [x, residual, weight]
    h_shape = (0,) if residual is None else x.shape
    dtype = HALF_AND_SINGLE.index(x.dtype)
    return run(
        program,
        ["fwd", dtype, *x.shape, EPS, int(residual is not None), 0, offset],
        inputs,
        [(x.shape, x.dtype), (h_shape, x.dtype), (x.shape[:1], torch.float32)],
    )


def backward(program, dy, x, weight, rstd, dresidual, splits, offset=0):
    """(dx, dweight); dweight is empty for splits = 0."""
    inputs = [dy, x, weight, rstd] + ([] if dresidual is None else [dresidual])
    dtype = HALF_AND_SINGLE.index(x.dtype)
    arguments = ["bwd", dtype, *x.shape, 0, int(dresidual is not None), splits, offset]
    return run(
        program,
        arguments,
        inputs,
        [(x.shape, x.dtype), (weight.shape if splits else (0,), x.dtype)],
    )


def differentiable(program, splits, offset=0):
    """x, residual, weight -> (y, h), with both passes by the program."""

    class AddRmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, weight):
            y, h, rstd = forward(program, x, residual, weight, offset)
            ctx.save_for_backward(h, weight, rstd)
            return y, h

        @staticmethod
        def backward(ctx, dy, dh):
            h, weight, rstd = ctx.saved_tensors
            dx, dweight = backward(program, dy, h, weight, rstd, dh, splits, offset)
            return dx, dx, dweight

    return AddRmsNorm.apply


# 16-byte accesses with 1, 2, 4 and 8 vectors a thread and from cache; single elements for odd rows.
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    "rows, hidden, splits",
    [
        (3, 1, 1),
        (63, 3, 8),
        (5, 17, 2),
        (9, 64, 9),
        (3, 100, 1),
        (2, 1028, 2),
        (1, 4096, 1),
        (3, 4099, 2),
        (2, 6000, 1),
        (2, 8200, 2),
    ],
    ids=str,
)
def test_against_fp64(program, rows, hidden, splits, dtype):
    matches_fp64(
        differentiable(program, splits),
        formulas.add_rms_norm,
        lambda: add_rms_norm_inputs((rows, hidden), dtype),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_unaligned_tensors(program, dtype):
    matches_fp64(
        differentiable(program, 2, offset=dtype.itemsize),
        formulas.add_rms_norm,
        lambda: add_rms_norm_inputs((3, 64), dtype),
    )


@pytest.mark.parametrize("hidden", [17, 64, 9000])
def test_the_optional_parts_change_nothing_else(program, hidden):
    x, other, weight = (torch.randn(s).half() for s in ((4, hidden), (4, hidden), hidden))
    y, _, rstd = forward(program, x, None, weight)
    with_zero, h, rstd_with_zero = forward(program, x, torch.zeros_like(x), weight)
    assert same_bits(y, with_zero) and same_bits(rstd, rstd_with_zero) and same_bits(h, x)
    dx, dweight = backward(program, other, x, weight, rstd, None, 0)
    dx_too, _ = backward(program, other, x, weight, rstd, torch.zeros_like(x), 2)
    assert same_bits(dx, dx_too) and dweight.numel() == 0


def test_no_rows(program):
    x, weight = torch.empty(0, 64), torch.randn(64)
    y, _, rstd = forward(program, x, None, weight)
    dx, dweight = backward(program, x, x, weight, rstd, None, 1)
    assert y.numel() == rstd.numel() == dx.numel() == 0
    assert same_bits(dweight, torch.zeros(64))


@pytest.mark.parametrize(
    "rows, hidden, splits, offset",
    [(3, 17, 2, 0), (2, 64, 1, 0), (2, 64, 1, 4), (1, 2052, 1, 0), (1, 9000, 1, 0)],
)
def test_sanitizers_find_nothing(sanitized, rows, hidden, splits, offset):
    for dtype in HALF_AND_SINGLE:
        x, residual, weight = add_rms_norm_inputs((rows, hidden), dtype)
        _, h, rstd = forward(sanitized, x, residual, weight, offset)
        dx, _ = backward(sanitized, residual, h, weight, rstd, x, splits, offset)
        assert dx.isfinite().all()
