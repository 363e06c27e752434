"""bias_dropout_add, forward and backward, of every backend and of PyTorch.

    python -m bench.bench_bias_dropout                       prints a table, writes bench/results/
    pytest --benchmark-enable bench/bench_bias_dropout.py    the same calls under pytest-benchmark

Bytes, with e = bytes an element, for M rows of H elements:

    fwd, p = 0 and p = 0.1    3 e M H + e H    x and residual in, y out
    bwd, p = 0.1              2 e M H          dy in, dx out

With p = 0 the gradient of x is dy itself and nothing runs. The peer is F.dropout(x + bias) +
residual, its backward through autograd, for x alone: the bias is frozen.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)
from bench.roofline import COPIES, COPY_SHAPE, in_turn

P = 0.1
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
# tensors of x's size that each piece of work reads and writes
TENSORS = {"fwd p=0": 3, f"fwd p={P}": 3, f"bwd p={P}": 2}


def works(device: str) -> list[Work]:
    return [work for dtype in DTYPES[device] for work in _works(device, dtype)]


def _works(device: str, dtype: torch.dtype) -> Iterator[Work]:
    M, H = COPY_SHAPE[device]
    turns = [_all_calls(device, dtype) for _ in range(COPIES[device])]
    for name, tensors in TENSORS.items():
        moved = (tensors * M * H + (H if name.startswith("fwd") else 0)) * dtype.itemsize
        for implementation in turns[0]:
            yield Work(
                f"bias_dropout_add {name}",
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
    inputs = [torch.randn(M, H, device=device).to(dtype) for _ in range(3)]
    bias = torch.randn(H, device=device).to(dtype)
    calls = {
        name: _calls(name, *inputs, bias)
        for name in available_backends("bias_dropout_add_fwd", device)
    }
    return calls | {"torch": _peer_calls(*inputs, bias)}


def _calls(backend: str, x, residual, dy, bias) -> dict[str, Callable]:
    """The pieces of work by one backend of glmkern."""
    op = torch.ops.glmkern
    sequences = (
        torch.tensor([5, 7], device=x.device),
        torch.tensor([0, len(x)], dtype=torch.int32, device=x.device),
        torch.zeros(1, dtype=torch.int64, device=x.device),
    )

    return {
        "fwd p=0": forced(
            backend, op.bias_dropout_add_fwd, x, bias, residual, 0.0, None, None, None
        ),
        f"fwd p={P}": forced(backend, op.bias_dropout_add_fwd, x, bias, residual, P, *sequences),
        f"bwd p={P}": forced(backend, op.bias_dropout_add_bwd, dy, P, *sequences, False),
    }


def _peer_calls(x, residual, dy, bias) -> dict[str, Callable]:
    leaf = x.detach().requires_grad_()
    y = F.dropout(leaf + bias, P) + residual
    return {
        "fwd p=0": lambda: x + bias + residual,
        f"fwd p={P}": lambda: F.dropout(x + bias, P) + residual,
        f"bwd p={P}": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
    }


if __name__ == "__main__":
    main("bias_dropout", works, __doc__)
