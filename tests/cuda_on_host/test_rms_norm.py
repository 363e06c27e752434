"""The CUDA kernels of rms_norm on the CPU: every dtype, every way of covering a row, odd shapes."""

import pytest
import torch

from tests.cuda_on_host.sanitized import unaligned
from tests.ops import formulas
from tests.ops.formulas import add_rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

EPS = 1e-5


def differentiable(kernels, place=torch.Tensor.clone):
    """x, residual, weight -> (y, h), with both passes by the kernels on copies by `place`."""

    class AddRmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, residual, weight):
            y, h, rstd = kernels.add_rms_norm_fwd(place(x), place(residual), place(weight), EPS)
            ctx.save_for_backward(place(h), place(weight), rstd)
            return y, h

        @staticmethod
        def backward(ctx, dy, dh):
            h, weight, rstd = ctx.saved_tensors
            dx, dweight = kernels.rms_norm_bwd(place(dy), h, weight, rstd, place(dh), True)
            return dx, dx, dweight

    return AddRmsNorm.apply


# 16-byte accesses with 1, 2, 4 and 8 vectors a thread and from cache; single elements for odd rows.
# The weight's gradient is summed in ceil(rows / 8) splits: 1, 2, 8 and 9, of unequal lengths, too.
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    "rows, hidden",
    [
        (3, 1),
        (63, 3),
        (5, 17),
        (9, 17),
        (9, 64),
        (66, 64),
        (3, 100),
        (2, 1028),
        (9, 1028),
        (1, 4096),
        (3, 4099),
        (9, 4099),
        (2, 6000),
        (2, 8200),
        (9, 8200),
    ],
    ids=str,
)
def test_against_fp64(kernels, rows, hidden, dtype):
    matches_fp64(
        differentiable(kernels),
        formulas.add_rms_norm,
        lambda: add_rms_norm_inputs((rows, hidden), dtype),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("rows", [3, 9])
def test_unaligned_tensors(kernels, rows, dtype):
    matches_fp64(
        differentiable(kernels, unaligned),
        formulas.add_rms_norm,
        lambda: add_rms_norm_inputs((rows, 64), dtype),
    )


@pytest.mark.parametrize("hidden", [17, 64, 9000])
def test_the_optional_parts_change_nothing_else(kernels, hidden):
    x, other, weight = (torch.randn(s).half() for s in ((4, hidden), (4, hidden), hidden))
    with poisoned_memory():
        y, rstd = kernels.rms_norm_fwd(x, weight, EPS)
        zero = torch.zeros_like(x)
        with_zero, h, rstd_with_zero = kernels.add_rms_norm_fwd(x, zero, weight, EPS)
        assert same_bits(y, with_zero) and same_bits(rstd, rstd_with_zero) and same_bits(h, x)
        dx, dweight = kernels.rms_norm_bwd(other, x, weight, rstd, None, False)
        dx_too, _ = kernels.rms_norm_bwd(other, x, weight, rstd, zero, True)
    assert same_bits(dx, dx_too) and dweight.numel() == 0


def test_no_rows(kernels):
    x, weight = torch.empty(0, 64), torch.randn(64)
    with poisoned_memory():
        y, rstd = kernels.rms_norm_fwd(x, weight, EPS)
        dx, dweight = kernels.rms_norm_bwd(x, x, weight, rstd, None, True)
    assert y.numel() == rstd.numel() == dx.numel() == 0
    assert same_bits(dweight, torch.zeros(64))


def test_splits_without_rows(kernels):
    """8,193 rows in 1,024 splits: nine rows a split leave none for the last ones."""
    x, weight = torch.randn(8193, 4), torch.randn(4)
    with poisoned_memory():
        _, rstd = kernels.rms_norm_fwd(x, weight, EPS)
        _, dweight = kernels.rms_norm_bwd(x, x, weight, rstd, None, True)
    exact = (x.double() ** 2 * rstd.double()[:, None]).sum(0)
    torch.testing.assert_close(dweight.double(), exact, rtol=1e-6, atol=0)
