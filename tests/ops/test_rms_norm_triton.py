"""The Triton rms_norm: against float64, and what only a kernel can get wrong."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import rms_norm as kernels
from glmkern.triton_kernels.tiles import row_tile
from tests.ops.formulas import add_rms_norm_inputs, rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

EPS = 1e-5
# rows of less than a vector, of odd length, of exactly one block, of half a block, of five blocks
SHAPES = [(1, 1), (3, 3), (63, 17), (63, 100), (2, 3, 100), (3, 4096), (1, 4099), (3, 8200)]


def random(shape, dtype, device, requires_grad=False):
    return torch.randn(shape).to(device, dtype).requires_grad_(requires_grad)


def formula(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype, device):
    matches_fp64(
        lambda x, w: ops.rms_norm(x, w, EPS),
        formula,
        lambda: rms_norm_inputs(shape, dtype, device=device),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape, dtype, device):
    matches_fp64(
        lambda x, r, w: ops.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (formula(x + r, w), x + r),
        lambda: add_rms_norm_inputs(shape, dtype, device=device),
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(63, 100), (2, 8200)], ids=str)
def test_sum_is_rounded_before_it_is_normalised(shape, dtype, device):
    x, residual = random(shape, dtype, device), random(shape, dtype, device)
    weight = random(shape[-1:], dtype, device)
    y, h = ops.add_rms_norm(x, residual, weight, EPS)
    assert same_bits(h, x + residual)
    assert same_bits(y, ops.rms_norm(h, weight, EPS))


@pytest.mark.parametrize("shape", [(63, 100), (3, 8200)], ids=str)
def test_frozen_weight(shape, device):
    """Without a weight gradient there is none, and dx is the same."""
    dy, x, dresidual = (random(shape, torch.float32, device) for _ in range(3))
    weight = random(shape[-1:], torch.float32, device)
    _, rstd = kernels.rms_norm_fwd(x, weight, EPS)
    with poisoned_memory():
        dx, dweight = kernels.rms_norm_bwd(dy, x, weight, rstd, dresidual, False)
        dx_too, _ = kernels.rms_norm_bwd(dy, x, weight, rstd, dresidual, True)
    assert dweight.numel() == 0
    torch.testing.assert_close(dx, dx_too, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(71, 17), (5, 8200)], ids=str)
def test_partials_of_many_rows(shape, device, monkeypatch):
    """A program that sums the weight gradient of several tiles, the last program of fewer."""
    monkeypatch.setattr(kernels, "MAX_PARTIALS", 4)
    matches_fp64(
        lambda x, w: ops.rms_norm(x, w, EPS),
        formula,
        lambda: rms_norm_inputs(shape, torch.float32, device=device),
    )


def test_same_bits_every_time(device):
    dy, x = random((63, 100), torch.float32, device), random((63, 100), torch.float32, device)
    weight = random(100, torch.float32, device)
    runs = []
    for _ in range(2):
        y, rstd = kernels.rms_norm_fwd(x, weight, EPS)
        runs.append([y, rstd, *kernels.rms_norm_bwd(dy, x, weight, rstd, None, True)])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 4099)], ids=str)
def test_touches_nothing_outside(shape, device, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, H = shape
    margin, buffers = 2 * H + 64, []

    def surrounded(fill):
        buffers.append(torch.full((2 * margin + M * H,), fill, device=device))
        return buffers[-1][margin : margin + M * H].view(M, H)

    x, residual, dy = (surrounded(torch.nan).copy_(torch.randn(shape)) for _ in range(3))
    weight = surrounded(torch.nan)[0].copy_(torch.randn(H))
    monkeypatch.setattr(torch, "empty_like", lambda like: surrounded(7.0))
    y, h, rstd = kernels.add_rms_norm_fwd(x, residual, weight, EPS)
    dx, dweight = kernels.rms_norm_bwd(dy, h, weight, rstd, residual, True)
    assert all(t.isfinite().all() for t in (y, h, rstd, dx, dweight))
    for buffer in buffers[4:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


def test_no_rows(device):
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = ops.rms_norm(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.zeros_like(y))
    assert y.shape == dx.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_zero_row(device):
    """eps alone is under the root."""
    x, weight = torch.zeros(1, 100, device=device), torch.ones(100, device=device)
    y, rstd = kernels.rms_norm_fwd(x, weight, 1e-6)
    assert torch.equal(y, x)
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3), rtol=1e-6, atol=0)


def test_forced_backend_runs_the_kernel(device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.rms_norm(x, weight)
    (launched,) = [call.args[0] for call in launch.call_args_list]
    assert launched is kernels.rms_norm_fwd_kernel


def test_forced_backend_refuses_float64(device):
    x, weight = (torch.ones(s, dtype=torch.float64, device=device) for s in ((2, 8), 8))
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve rms_norm_fwd"):
        ops.rms_norm(x, weight)


@pytest.mark.parametrize("length", [1, 3, 256, 257, 4099, 8192])
def test_row_tile_holds_the_row(length):
    tile = row_tile(length)
    assert length <= tile.columns < 2 * length
    assert tile.columns & (tile.columns - 1) == 0
    assert tile.rows * tile.columns <= 16 * 32 * tile.num_warps


def test_row_tile_of_long_rows():
    assert row_tile(8193) == row_tile(10**6)
    assert row_tile(8193).columns < 8193
