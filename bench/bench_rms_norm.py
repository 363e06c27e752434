"""rms_norm and add_rms_norm, forward and backward, of every backend and of PyTorch.

    python -m bench.bench_rms_norm                       prints a table and writes bench/results/
    pytest --benchmark-enable bench/bench_rms_norm.py    the same calls under pytest-benchmark

Bytes, with e = bytes an element, for M rows of H elements, float32 rstd and a frozen weight:

    rms_norm fwd        2 e M H + e H + 4 M      x in, y out
    rms_norm bwd        3 e M H + e H + 4 M      dy and x in, dx out
    add_rms_norm fwd    4 e M H + e H + 4 M      x and residual in, y and h out
    add_rms_norm bwd    4 e M H + e H + 4 M      dy, h and dh in, dx out

The peer is F.rms_norm, its backward through autograd.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import glmkern
from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)
from bench.roofline import COPIES, COPY_SHAPE, in_turn

EPS = 1e-5
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
# tensors of x's size that each piece of work reads and writes
TENSORS = {"rms_norm fwd": 2, "rms_norm bwd": 3, "add_rms_norm fwd": 4, "add_rms_norm bwd": 4}


def works(device: str) -> list[Work]:
    return [work for dtype in DTYPES[device] for work in _works(device, dtype)]


def _works(device: str, dtype: torch.dtype) -> Iterator[Work]:
    M, H = COPY_SHAPE[device]
    turns = [_all_calls(device, dtype) for _ in range(COPIES[device])]
    for name, tensors in TENSORS.items():
        moved = (tensors * M * H + H) * dtype.itemsize + 4 * M
        for implementation in turns[0]:
            yield Work(
                name,
                implementation,
                (M, H),
                dtype,
                moved,
                0,
                in_turn([calls[implementation][name] for calls in turns]),
                peer=implementation == "torch",
            )


def _all_calls(device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """implementation -> piece of work -> call, on tensors of their own."""
    M, H = COPY_SHAPE[device]
    inputs = [torch.randn(M, H, device=device).to(dtype) for _ in range(4)]
    weight = torch.rand(H, device=device).to(dtype)
    calls = {
        name: _calls(name, *inputs, weight) for name in available_backends("rms_norm_fwd", device)
    }
    return calls | {"torch": _peer_calls(*inputs, weight)}


def _calls(backend: str, x, residual, dy, dh, weight) -> dict[str, Callable]:
    """The four pieces of work by one backend of glmkern."""
    op = torch.ops.glmkern
    with glmkern.backend(backend):
        _, rstd = op.rms_norm_fwd(x, weight, EPS)
        _, h, h_rstd = op.add_rms_norm_fwd(x, residual, weight, EPS)

    return {
        "rms_norm fwd": forced(backend, op.rms_norm_fwd, x, weight, EPS),
        "rms_norm bwd": forced(backend, op.rms_norm_bwd, dy, x, weight, rstd, None, False),
        "add_rms_norm fwd": forced(backend, op.add_rms_norm_fwd, x, residual, weight, EPS),
        "add_rms_norm bwd": forced(backend, op.rms_norm_bwd, dy, h, weight, h_rstd, dh, False),
    }


def _peer_calls(x, residual, dy, dh, weight) -> dict[str, Callable]:
    """The four pieces of work by F.rms_norm and, for the backward, autograd."""

    def norm(x):
        return F.rms_norm(x, x.shape[-1:], weight, EPS)

    leaf = x.detach().requires_grad_()
    y, h = norm(leaf), leaf + residual
    y_of_sum = norm(h)
    return {
        "rms_norm fwd": lambda: norm(x),
        "rms_norm bwd": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
        "add_rms_norm fwd": lambda: norm(x + residual),
        "add_rms_norm bwd": lambda: torch.autograd.grad(
            (y_of_sum, h), leaf, (dy, dh), retain_graph=True
        ),
    }


if __name__ == "__main__":
    main("rms_norm", works, __doc__)
