"""What only a kernel of rms_norm can get wrong: bits, splits, memory, direct calls."""

from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.triton_kernels import rms_norm as kernels
from glmkern.triton_kernels.tiles import row_tile
from tests.backends import slow
from tests.ops import formulas
from tests.ops.formulas import add_rms_norm_inputs, rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "rms_norm_fwd"
EPS = 1e-5
library = torch.ops.glmkern


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_survives_and_sums_round_to_even(backend, dtype):
    """The kernel's own conversions, met through h: all values, ties, overflow and subnormals."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()].unsqueeze(0)
    weight = torch.ones(every.shape[1], dtype=dtype)
    for other in (torch.zeros_like(every), every.flip(1), every / 2, every.roll(1, 1)):
        h = ops.add_rms_norm(every, other, weight)[1]
        expected = every + other
        assert same_bits(h.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert h.isnan().equal(expected.isnan())


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 65), (63, 4099), (3, 4096)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, shape, dtype):
    inputs = add_rms_norm_inputs(shape, dtype)
    upstream = [torch.randn(shape).to(dtype) for _ in range(2)]

    def run(count):
        threads(count)
        with poisoned_memory():
            outputs = ops.add_rms_norm(*inputs)
            return outputs + torch.autograd.grad(outputs, inputs, upstream)

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("shape", [(63, 100), slow((300, 4096))], ids=str)
def test_same_bits_every_time(backend, shape):
    dy, x, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    runs = []
    for _ in range(2):
        y, rstd = library.rms_norm_fwd(x, weight, EPS)
        runs.append([y, rstd, *library.rms_norm_bwd(dy, x, weight, rstd, None, True)])
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.backends("cpu")
def test_a_large_output_has_the_bits_of_its_pieces(backend):
    """Outputs beyond the caches are stored past them, by other instructions."""
    x, residual, weight = torch.randn(1100, 4096), torch.randn(1100, 4096), torch.randn(4096)
    with poisoned_memory():
        whole = library.add_rms_norm_fwd(x, residual, weight, EPS)
        parts = [
            library.add_rms_norm_fwd(a, b, weight, EPS)
            for a, b in zip(x.split(100), residual.split(100), strict=True)
        ]
        dx = library.rms_norm_bwd(residual, x, weight, whole[2], None, False)[0]
        dx_parts = [
            library.rms_norm_bwd(b, a, weight, part[2], None, False)[0]
            for a, b, part in zip(x.split(100), residual.split(100), parts, strict=True)
        ]
    assert all(
        same_bits(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True)
    )
    assert same_bits(dx, torch.cat(dx_parts))


@pytest.mark.backends("cpu", "cuda")
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
def test_the_kernels_guard_direct_calls(backend, position, wrong, sentence):
    arguments = [torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(8), torch.zeros(3), None, True]
    arguments[position] = wrong.to(backend.device)
    with pytest.raises(RuntimeError, match=f"^rms_norm_bwd: {sentence}$"):
        backend.kernels.rms_norm_bwd(*arguments)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("shape", [(63, 100), (3, 8200)], ids=str)
def test_frozen_weight(backend, shape):
    """Without a weight gradient there is none, and dx is the same."""
    dy, x, dresidual = torch.randn(3, *shape)
    weight = torch.randn(shape[-1:])
    _, rstd = kernels.rms_norm_fwd(x, weight, EPS)
    with poisoned_memory():
        dx, dweight = kernels.rms_norm_bwd(dy, x, weight, rstd, dresidual, False)
        dx_too, _ = kernels.rms_norm_bwd(dy, x, weight, rstd, dresidual, True)
    assert dweight.numel() == 0
    torch.testing.assert_close(dx, dx_too, rtol=1e-6, atol=1e-6)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("shape", [(71, 17), (5, 8200)], ids=str)
def test_partials_of_many_rows(backend, shape, monkeypatch):
    """A program that sums the weight gradient of several tiles, the last program of fewer."""
    monkeypatch.setattr(kernels, "MAX_PARTIALS", 4)
    matches_fp64(ops.rms_norm, formulas.rms_norm, lambda: rms_norm_inputs(shape, torch.float32))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 4099)], ids=str)
def test_touches_nothing_outside(backend, shape, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, H = shape
    margin, buffers = 2 * H + 64, []

    def surrounded(fill):
        buffers.append(torch.full((2 * margin + M * H,), fill))
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


@pytest.mark.backends("triton")
def test_forced_backend_runs_the_kernel(backend):
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.rms_norm(torch.ones(2, 8), torch.ones(8))
    (launched,) = [call.args[0] for call in launch.call_args_list]
    assert launched is kernels.rms_norm_fwd_kernel


@pytest.mark.parametrize("length", [1, 3, 256, 257, 4099, 8192])
def test_row_tile_holds_the_row(length):
    tile = row_tile(length)
    assert length <= tile.columns < 2 * length
    assert tile.columns & (tile.columns - 1) == 0
    assert tile.rows * tile.columns <= 16 * 32 * tile.num_warps


def test_row_tile_of_long_rows():
    assert row_tile(8193) == row_tile(10**6)
    assert row_tile(8193).columns < 8193
