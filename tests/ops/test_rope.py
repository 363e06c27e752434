"""rope against float64, its inverse, its registration and its errors."""

import pytest
import torch

from glmkern import ops
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64


def table(positions, pairs):
    angles = torch.rand(positions, pairs, dtype=torch.float64) * 100
    return torch.stack([angles.cos(), angles.sin()], -1)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "channels", "pairs"),
                         [(1, 1, 2, 1), (3, 5, 12, 3), (17, 34, 128, 32), (7, 2, 10, 5)])
def test_against_fp64(tokens, heads, channels, pairs, dtype):
    cos_sin, positions = table(50, pairs).float(), torch.randint(50, (tokens,))

    def formula(x):
        rotation = torch.view_as_complex(cos_sin.double())[positions].unsqueeze(1)
        wide = x.double() if x.dtype == torch.float64 else x.float()
        pairs_of_x = torch.view_as_complex(wide[..., :2 * pairs].unflatten(-1, (-1, 2)))
        rotation = rotation.to(pairs_of_x.dtype)
        rotated = torch.view_as_real(pairs_of_x * rotation).flatten(-2)
        return torch.cat([rotated.to(x.dtype), x[..., 2 * pairs:]], -1)

    matches_fp64(lambda x: ops.rope(x, cos_sin, positions), formula,
                 lambda: [torch.randn(tokens, heads, channels).to(dtype).requires_grad_()])


def test_strided_heads():
    cos_sin, positions = table(9, 4).float(), torch.arange(5)
    wide = torch.randn(5, 7, 16)
    torch.testing.assert_close(ops.rope(wide[:, 2:6], cos_sin, positions),
                               ops.rope(wide[:, 2:6].contiguous(), cos_sin, positions),
                               rtol=0, atol=0)


def test_registration():
    cos_sin, positions = table(9, 2).float(), torch.tensor([8, 0, 3])
    x = torch.randn(3, 2, 6, requires_grad=True)
    check_registration(torch.ops.glmkern.rope_fwd.default, (x, cos_sin, positions))
    check_registration(torch.ops.glmkern.rope_bwd.default, (x.detach(), cos_sin, positions))
    check_compiles(lambda x, positions: ops.rope(x, cos_sin, positions),
                   [[torch.randn(n, 2, 6, requires_grad=True), torch.arange(n)] for n in (3, 8)])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(x=torch.zeros(3, 8)), r"x must be \[T, heads, C\]"),
    (dict(x=torch.zeros(3, 1, 8, dtype=torch.int32)), "x must be float32"),
    (dict(cos_sin=torch.zeros(9, 5, 2)), "2R <= 8, the channels of x"),
    (dict(positions=torch.zeros(2, dtype=torch.int64)), r"positions must be int64 \[3\]"),
    (dict(positions=torch.zeros(3, dtype=torch.int32)), r"positions must be int64 \[3\]"),
    (dict(positions=torch.tensor([0, 9, 1])), "positions run from 0 to 9, but the table holds"),
    (dict(positions=torch.tensor([0, -1, 1])), "positions run from -1 to 1"),
])
def test_errors(arguments, sentence):
    call = dict(x=torch.zeros(3, 1, 8), cos_sin=torch.zeros(9, 2, 2), positions=torch.arange(3))
    with pytest.raises(ValueError, match=sentence):
        ops.rope(**{**call, **arguments})
