"""prefix_attention, forward, backward and decode, of every backend and of PyTorch's SDPA.

    python -m bench.bench_prefix_attention                       prints a table and writes
                                                                 bench/results/
    pytest --benchmark-enable bench/bench_prefix_attention.py    the same calls under
                                                                 pytest-benchmark

ChatGLM2-6B's heads: 32 of 128 channels, keys and values in 2 groups; a prefix of 128 and one
sequence of S tokens, in float32 on a CPU, in bfloat16 on a GPU. Counted are useful flops, 4 C a
score forward and 2.5 times that backward, scores above the causal diagonal left out; the fraction
is of the matrix product rate. Decode is one new token for each of B rows with S tokens in the
cache, all of which have to be read: there the fraction is of whichever limit is the nearer.

The peers concatenate prefix and tokens and give SDPA the mask, made once outside, in numbers as
SDPA would turn booleans into them at every call: with keys and values expanded to all heads, as the
official code does, and with enable_gqa. Their backward gives the prefix's gradient too.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Work, available_backends, forced, main, pytest_generate_tests, test_speed  # noqa: F401 (pytest finds its two here)

HEADS, GROUPS, CHANNELS, PREFIX = 32, 2, 128, 128
LENGTHS = {"cpu": (192, 512, 1024), "cuda": (192, 512, 1024, 2048)}
CACHES = {"cpu": ((1, 1024), (16, 512)), "cuda": ((1, 4096), (64, 2048))}  # rows, tokens
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SCALE = CHANNELS**-0.5


def flops(length: int) -> int:
    """Useful flops of a forward pass."""
    return 4 * CHANNELS * HEADS * (length * (length + 1) // 2 + length * PREFIX)


def works(device: str) -> list[Work]:
    return [
        *(work for length in LENGTHS[device] for work in _works(device, length)),
        *(work for rows, length in CACHES[device] for work in _decodes(device, rows, length)),
    ]


def _decodes(device: str, rows: int, length: int) -> Iterator[Work]:
    def random(*shape):
        return torch.randn(*shape, CHANNELS, device=device).to(DTYPE[device])

    q, cache = random(rows, 1, HEADS), [random(rows, length, GROUPS) for _ in range(2)]
    prefix = [random(PREFIX, GROUPS) for _ in range(2)]
    lens = torch.full((rows,), length, device=device)
    calls = {
        name: forced(
            name,
            torch.ops.glmkern.prefix_attention_decode_fwd,
            q,
            *cache,
            lens,
            *prefix,
            torch.ones_like(lens),
            SCALE,
        )
        for name in available_backends("prefix_attention_decode_fwd", device)
    }
    calls["sdpa, enable_gqa"] = lambda: _decode_grouped(q, *cache, *prefix)
    nbytes = sum(x.nbytes for x in (q, *cache, *prefix, q))
    count = 4 * CHANNELS * HEADS * rows * (length + PREFIX)
    for implementation, call in calls.items():
        yield Work(
            f"prefix_attention_decode B={rows} S={length}",
            implementation,
            (rows, length, HEADS, CHANNELS),
            DTYPE[device],
            nbytes,
            count,
            call,
            peer=implementation.startswith("sdpa"),
        )


def _decode_grouped(q, k_cache, v_cache, prefix_k, prefix_v) -> Tensor:
    keys, values = (
        torch.cat((prefix.expand(len(q), -1, -1, -1), cache), 1).transpose(1, 2)
        for prefix, cache in ((prefix_k, k_cache), (prefix_v, v_cache))
    )
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, scale=SCALE, enable_gqa=True
    )  # [B, N, 1, C]
    return out.transpose(1, 2)


def _works(device: str, length: int) -> Iterator[Work]:
    def random(tokens, heads):
        return torch.randn(tokens, heads, CHANNELS, device=device).to(DTYPE[device])

    q, dout = (random(length, HEADS) for _ in range(2))
    k, v = (random(length, GROUPS) for _ in range(2))
    prefix = [random(PREFIX, GROUPS) for _ in range(2)]
    inputs = [q, k, v, *prefix]
    implementations = {
        name: _calls(name, *inputs, dout)
        for name in available_backends("prefix_attention_fwd", device)
    }
    peers = {"sdpa, expanded": _attend_expanded, "sdpa, enable_gqa": _attend_grouped}
    for name, attend in peers.items():
        implementations[name] = _peer_calls(attend, inputs, dout)
    for implementation, (forward, backward) in implementations.items():
        for name, call, count in (
            ("fwd", forward, flops(length)),
            ("bwd", backward, flops(length) * 5 // 2),
        ):
            yield Work(
                f"prefix_attention {name} S={length}",
                implementation,
                (length, HEADS, CHANNELS),
                DTYPE[device],
                0,
                count,
                call,
                peer=implementation in peers,
            )


def _calls(backend: str, q, k, v, prefix_k, prefix_v, dout) -> tuple[Callable, Callable]:
    """Forward and backward by one backend of glmkern."""
    op = torch.ops.glmkern
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    sequence_ids = torch.zeros(1, dtype=torch.int64, device=q.device)
    sequences = (cu_seqlens, sequence_ids, None, SCALE, 0.0)

    forward = forced(backend, op.prefix_attention_fwd, q, k, v, prefix_k, prefix_v, *sequences)
    out, lse = forward()
    backward = forced(
        backend,
        op.prefix_attention_bwd,
        dout,
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        out,
        lse,
        *sequences,
        True,
        True,
    )
    return forward, backward


def _peer_calls(attend: Callable, inputs: list[Tensor], dout: Tensor) -> tuple[Callable, Callable]:
    """Forward and, through autograd, backward by SDPA."""
    length = len(dout)
    mask = torch.full(
        (length, PREFIX + length), -torch.inf, dtype=dout.dtype, device=dout.device
    ).triu(PREFIX + 1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, mask)
    return (
        lambda: attend(*inputs, mask),
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    )


def _attend_grouped(q, k, v, prefix_k, prefix_v, mask) -> Tensor:
    keys, values = (
        torch.cat(pair).transpose(0, 1).unsqueeze(0) for pair in ((prefix_k, k), (prefix_v, v))
    )  # [1, G, P + S, C]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), keys, values, mask, scale=SCALE, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_expanded(q, k, v, prefix_k, prefix_v, mask) -> Tensor:
    keys, values = (
        torch.cat(pair).repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1)
        for pair in ((prefix_k, k), (prefix_v, v))
    )  # [N, P + S, C]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), mask, scale=SCALE
    )
    return out.squeeze(0).transpose(0, 1)


if __name__ == "__main__":
    main("prefix_attention", works, __doc__)
