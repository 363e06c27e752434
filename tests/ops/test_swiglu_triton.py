"""The Triton swiglu: against float64, and what only a kernel can get wrong."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import swiglu as kernels
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

# widths of one element, of less than a vector, of half a tile, of exactly one, of two and of more;
# tiles whose last rows are missing
SHAPES = [(2,), (1, 2), (3, 34), (17, 66), (2, 3, 200), (9, 1024), (3, 2048), (5, 2742), (1, 27392)]


def formula(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, dtype, device):
    matches_fp64(
        ops.swiglu, formula, lambda: [(3 * torch.randn(shape)).to(device, dtype).requires_grad_()]
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gates_far_from_zero(dtype, device):
    """exp's range ends at 88: sigmoid is 0, as far as float32 shows it, or 1 there."""
    gate = torch.tensor([-1e4, -200.0, -89.0, -87.5, -80.0, -20.0, -0.0, 0.0, 20.0, 80.0, 200.0])
    x = torch.cat([gate, torch.ones(len(gate))]).to(device, dtype).requires_grad_()
    matches_fp64(ops.swiglu, formula, [x])
    assert ops.swiglu(x)[-1] == 200


def test_no_elements(device):
    for shape in ((0, 6), (3, 0)):
        x = torch.randn(shape, device=device, requires_grad=True)
        y = ops.swiglu(x)
        assert y.shape == (shape[0], shape[1] // 2)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_inputs_with_strides(device):
    x = torch.randn(6, 10, device=device).t()
    assert same_bits(ops.swiglu(x), ops.swiglu(x.contiguous()))


def test_a_row_does_not_depend_on_the_others(device):
    """The tiles divide the rows, not the arithmetic."""
    x, dy = torch.randn(9, 1400, device=device), torch.randn(9, 700, device=device)
    y, dx = kernels.swiglu_fwd(x), kernels.swiglu_bwd(dy, x)
    for row in range(9):
        assert same_bits(y[row : row + 1], kernels.swiglu_fwd(x[row : row + 1]))
        assert same_bits(dx[row : row + 1], kernels.swiglu_bwd(dy[row : row + 1], x[row : row + 1]))


def test_same_bits_every_time(device):
    x, dy = torch.randn(17, 2742, device=device), torch.randn(17, 1371, device=device)
    with poisoned_memory():
        first, second = ((kernels.swiglu_fwd(x), kernels.swiglu_bwd(dy, x)) for _ in range(2))
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 1371)], ids=str)
def test_touches_nothing_outside(shape, device, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, width = shape
    margin, buffers = 16 * width + 4096, []

    def surrounded(fill, *size):
        buffers.append(torch.full((2 * margin + size[0] * size[1],), fill, device=device))
        return buffers[-1][margin:-margin].view(size)

    x = surrounded(torch.nan, M, 2 * width).copy_(torch.randn(M, 2 * width))
    dy = surrounded(torch.nan, M, width).copy_(torch.randn(shape))
    new_empty = torch.Tensor.new_empty  # the interpreter uses it too
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda like, *size, **options: (
            surrounded(7.0, *size) if size == tuple(shape) else new_empty(like, *size, **options)
        ),
    )
    monkeypatch.setattr(torch, "empty_like", lambda like: surrounded(7.0, *like.shape))
    y, dx = kernels.swiglu_fwd(x), kernels.swiglu_bwd(dy, x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert len(buffers) == 4
    for buffer in buffers[2:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


def test_forced_backend_runs_the_kernels(device):
    x = torch.ones(2, 8, device=device, requires_grad=True)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.swiglu(x).sum().backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.swiglu_fwd_kernel,
        kernels.swiglu_bwd_kernel,
    ]


def test_forced_backend_refuses_float64(device):
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve swiglu_fwd"):
        ops.swiglu(x)
