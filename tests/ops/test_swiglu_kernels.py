"""What only a kernel of swiglu can get wrong: bits, tiles, memory, direct calls."""

from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.triton_kernels import swiglu as kernels
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits

OP = "swiglu_fwd"
library = torch.ops.glmkern


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 130), (1, 54784), (63, 4099 * 2)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, shape, dtype):
    """Threads may meet amid a row: one row is shared too."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape[0], shape[1] // 2).to(dtype)

    def run(count):
        threads(count)
        with poisoned_memory():
            y = ops.swiglu(x)
            return y, torch.autograd.grad(y, x, upstream)[0]

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("triton", "cuda")
def test_same_bits_every_time(backend):
    x, dy = torch.randn(17, 2742), torch.randn(17, 1371)
    with poisoned_memory():
        first, second = ((library.swiglu_fwd(x), library.swiglu_bwd(dy, x)) for _ in range(2))
    assert all(map(same_bits, first, second))


@pytest.mark.backends("cpu", "triton", "cuda")
def test_a_row_does_not_depend_on_the_others(backend):
    """The tiles divide the rows, not the arithmetic."""
    x, dy = torch.randn(9, 1400), torch.randn(9, 700)
    y, dx = library.swiglu_fwd(x), library.swiglu_bwd(dy, x)
    for row in range(9):
        assert same_bits(y[row : row + 1], library.swiglu_fwd(x[row : row + 1]))
        assert same_bits(dx[row : row + 1], library.swiglu_bwd(dy[row : row + 1], x[row : row + 1]))


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize(
    ("dy", "x", "sentence"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 8), "dy must have 12 elements, not 8"),
        (torch.zeros(3, 4).half(), torch.zeros(3, 8), "dy has another dtype"),
        (torch.zeros(3, 4), torch.zeros(8, 3).t(), "x is not contiguous"),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 7),
            "x's last dimension must hold two halves of one size",
        ),
    ],
)
def test_the_kernels_guard_direct_calls(backend, dy, x, sentence):
    with pytest.raises(RuntimeError, match=f"^swiglu_bwd: {sentence}$"):
        backend.kernels.swiglu_bwd(dy.to(backend.device), x.to(backend.device))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 1371)], ids=str)
def test_touches_nothing_outside(backend, shape, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, width = shape
    margin, buffers = 16 * width + 4096, []

    def surrounded(fill, *size):
        buffers.append(torch.full((2 * margin + size[0] * size[1],), fill))
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


@pytest.mark.backends("triton")
def test_forced_backend_runs_the_kernels(backend):
    x = torch.ones(2, 8, requires_grad=True)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.swiglu(x).sum().backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.swiglu_fwd_kernel,
        kernels.swiglu_bwd_kernel,
    ]
