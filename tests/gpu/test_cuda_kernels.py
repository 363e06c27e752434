"""The CUDA C++ kernels on a GPU, against float64."""

import pytest
import torch

import glmkern
from glmkern import ops
from tests.ops import formulas
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

SHAPES = [(1, 1), (63, 17), (2, 3, 100), (300, 4096), (5, 4099), (3, 13696)]


@pytest.fixture(autouse=True)
def _cuda():
    with glmkern.backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype):
    matches_fp64(
        ops.rms_norm, formulas.rms_norm, lambda: formulas.rms_norm_inputs(shape, dtype, "cuda")
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape, dtype):
    matches_fp64(
        ops.add_rms_norm,
        formulas.add_rms_norm,
        lambda: formulas.add_rms_norm_inputs(shape, dtype, "cuda"),
    )


def test_the_same_bits_on_every_run():
    x = torch.randn(300, 4096, device="cuda", requires_grad=True)
    weight = torch.randn(4096, device="cuda", requires_grad=True)

    def results() -> list[torch.Tensor]:
        y = ops.rms_norm(x, weight)
        return [y, *torch.autograd.grad(y, (x, weight), y)]

    assert all(map(same_bits, results(), results()))
