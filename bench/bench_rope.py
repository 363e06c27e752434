"""rope and its fused forms around query_key_value, of every backend and of PyTorch.

    python -m bench.bench_rope                       prints a table and writes bench/results/
    pytest --benchmark-enable bench/bench_rope.py    the same calls under pytest-benchmark

Bytes, with e = bytes an element, for T tokens of N + G heads of C channels. The table's part in use
is added, T rows of C / 2 float32:

    rope fwd, bwd    2 e T (N + G) C     q and k in, rotated q and k out
    qkv fwd, bwd     2 e T (N + 2G) C    qkv in, q, k and v out, or back

The tensors of 512 tokens fit into a large last-level cache. The fraction of copy bandwidth is
measured in memory and may then exceed 1. The peer is plain PyTorch: complex products for rope (its
backward through autograd), and for qkv the bias, a split, complex products and copies; back, a
concatenation.
"""

from collections.abc import Callable, Iterator

import torch

from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)
from glmkern.model.config import ChatGLMConfig
from glmkern.model.rotary import rotary_table

TOKENS = {"cpu": 512, "cuda": 4096}
N, G, C = 32, 2, 128
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
HEADS = {"rope fwd": N + G, "rope bwd": N + G, "qkv fwd": N + 2 * G, "qkv bwd": N + 2 * G}


def works(device: str) -> list[Work]:
    return [work for dtype in DTYPES[device] for work in _works(device, dtype)]


def _works(device: str, dtype: torch.dtype) -> Iterator[Work]:
    T = TOKENS[device]
    qkv = torch.randn(T, (N + 2 * G) * C, device=device).to(dtype)
    bias = torch.randn(qkv.shape[1], device=device).to(dtype)
    cos_sin = rotary_table(ChatGLMConfig(), torch.float32, device=device)
    positions = torch.arange(T, device=device)
    calls = {
        name: _calls(name, qkv, bias, cos_sin, positions)
        for name in available_backends("rope_fwd", device)
    }
    calls["torch"] = _peer_calls(qkv, bias, cos_sin, positions)
    for name, heads in HEADS.items():
        moved = 2 * T * heads * C * dtype.itemsize + T * cos_sin[0].nbytes
        for implementation in calls:
            yield Work(
                name,
                implementation,
                (T, heads, C),
                dtype,
                moved,
                0,
                calls[implementation][name],
                peer=implementation == "torch",
            )


def _calls(backend: str, qkv, bias, *angles) -> dict[str, Callable]:
    """The four pieces of work by one backend of glmkern."""
    op = torch.ops.glmkern
    qk = qkv.unflatten(1, (-1, C))[:, : N + G].contiguous()
    q, k, v = (t.contiguous() for t in qkv.unflatten(1, (-1, C)).split([N, G, G], 1))

    return {
        "rope fwd": forced(backend, op.rope_fwd, qk, *angles),
        "rope bwd": forced(backend, op.rope_bwd, qk, *angles),
        "qkv fwd": forced(backend, op.qkv_rope_fwd, qkv, bias, *angles, N, G, False),
        "qkv bwd": forced(backend, op.qkv_rope_bwd, q, k, v, *angles, False),
    }


def _peer_calls(qkv, bias, cos_sin, positions) -> dict[str, Callable]:
    width = 2 * cos_sin.shape[1]
    rotation = torch.view_as_complex(cos_sin)

    def rotated(x, rotation):
        pairs = torch.view_as_complex(x[..., :width].float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * rotation[positions].unsqueeze(1)).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., width:]], -1)

    def forward(qkv):
        heads = (qkv + bias).unflatten(1, (-1, C))
        qk = rotated(heads[:, : N + G], rotation)
        return qk[:, :N].contiguous(), qk[:, N:].contiguous(), heads[:, N + G :].contiguous()

    def backward(q, k, v):
        dqk = rotated(torch.cat([q, k], 1), rotation.conj())
        return torch.cat([dqk, v], 1).flatten(1)

    qk = qkv.unflatten(1, (-1, C))[:, : N + G].contiguous()
    parts = [t.contiguous() for t in qkv.unflatten(1, (-1, C)).split([N, G, G], 1)]
    leaf = qk.detach().requires_grad_()
    y = rotated(leaf, rotation)
    return {
        "rope fwd": lambda: rotated(qk, rotation),
        "rope bwd": lambda: torch.autograd.grad(y, leaf, qk, retain_graph=True),
        "qkv fwd": lambda: forward(qkv),
        "qkv bwd": lambda: backward(*parts),
    }


if __name__ == "__main__":
    main("rope", works, __doc__)
