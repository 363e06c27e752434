"""swiglu, forward and backward, of every backend and of PyTorch.

    python -m bench.bench_swiglu                       prints a table and writes bench/results/
    pytest --benchmark-enable bench/bench_swiglu.py    the same calls under pytest-benchmark

Bytes, with e = bytes an element, for M rows of F gates and F ups:

    fwd    3 e M F    x (gate and up) in, y out
    bwd    5 e M F    dy and x in, dx out

On a CPU the tensors are those of 512 tokens of a quarter of ChatGLM2's width; they fit into a large
last-level cache, so that the fraction of copy bandwidth, measured in memory, may exceed 1. The peer
is F.silu(gate) * up, its backward through autograd.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)

SHAPE = {"cpu": (512, 3424), "cuda": (4096, 13696)}  # tokens, F
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
TENSORS = {"fwd": 3, "bwd": 5}  # of y's size that each piece of work reads and writes


def works(device: str) -> list[Work]:
    return [work for dtype in DTYPES[device] for work in _works(device, dtype)]


def _works(device: str, dtype: torch.dtype) -> Iterator[Work]:
    M, width = SHAPE[device]
    x = torch.randn(M, 2 * width, device=device).to(dtype)
    dy = torch.randn(M, width, device=device).to(dtype)
    calls = {name: _calls(name, x, dy) for name in available_backends("swiglu_fwd", device)}
    calls["torch"] = _peer_calls(x, dy)
    for name, tensors in TENSORS.items():
        for implementation in calls:
            yield Work(
                f"swiglu {name}",
                implementation,
                (M, 2 * width),
                dtype,
                tensors * dy.nbytes,
                0,
                calls[implementation][name],
                peer=implementation == "torch",
            )


def _calls(backend: str, x, dy) -> dict[str, Callable]:
    """Both pieces of work by one backend of glmkern."""
    op = torch.ops.glmkern

    return {"fwd": forced(backend, op.swiglu_fwd, x), "bwd": forced(backend, op.swiglu_bwd, dy, x)}


def _peer_calls(x, dy) -> dict[str, Callable]:
    def swiglu(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    leaf = x.detach().requires_grad_()
    y = swiglu(leaf)
    return {
        "fwd": lambda: swiglu(x),
        "bwd": lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True),
    }


if __name__ == "__main__":
    main("swiglu", works, __doc__)
