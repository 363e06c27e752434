"""swiglu against float64, its registration and its errors."""

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (2, 3, 200), (63, 1370)], ids=str)
def test_against_fp64(shape, dtype):
    def formula(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    matches_fp64(ops.swiglu, formula,
                 lambda: [(3 * torch.randn(shape)).to(dtype).requires_grad_()])


def test_registration():
    x = torch.randn(3, 8, requires_grad=True)
    check_registration(torch.ops.glmkern.swiglu_fwd.default, (x,))
    check_registration(torch.ops.glmkern.swiglu_bwd.default, (torch.randn(3, 4), x.detach()))
    check_compiles(ops.swiglu, [[torch.randn(n, 8, requires_grad=True)] for n in (3, 6)])


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.tensor(1.0)])
def test_odd_width(x):
    with pytest.raises(ValueError, match="gate and up, two halves of one size"):
        ops.swiglu(x)


def test_wrong_dtype():
    with pytest.raises(ValueError, match="x must be float32, float16, bfloat16 or float64"):
        ops.swiglu(torch.zeros(2, 4, dtype=torch.int64))
