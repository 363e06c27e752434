"""What the tests of prefix_attention share: inputs, formulas, and the tiles of its Triton
kernels."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from glmkern import ops
from glmkern.triton_kernels.prefix_attention import backward, decode, dkv, dprefix, forward, shared

SEED = (-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1)
FILES = (forward, backward, decode, dkv, dprefix, shared)
TILES = {file: file.TILES for file in (forward, backward, decode, dkv)}
SMALL, MEDIUM = shared.AttentionTile(16, 16, 4, 1), shared.AttentionTile(32, 32, 4, 1)


@contextlib.contextmanager
def tiles(tile: shared.AttentionTile | None) -> Iterator[None]:
    """All Triton kernels with this tile, or with their own."""
    with contextlib.ExitStack() as stack:
        for file, own in TILES.items():
            table = own if tile is None else {64: {2: tile, 4: tile}}
            stack.enter_context(mock.patch.object(file, "TILES", table))
        yield


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense(q, k, v, prefix_k, prefix_v, lengths, factor=None):
    """One explicit softmax a sequence over the concatenated keys; `factor` [B, 2, P, G, C] is what
    dropout multiplies the prefix by."""
    outputs, start = [], 0
    for b, length in enumerate(lengths):
        tokens = slice(start, start + length)
        start += length
        segments = [(k[tokens], v[tokens])]
        if prefix_k is not None:
            prefix = [
                x if factor is None else x * factor[b, i].to(x.dtype)
                for i, x in enumerate((prefix_k.to(q.dtype), prefix_v.to(q.dtype)))
            ]
            segments.insert(0, prefix)
        keys, values = (torch.cat(x) for x in zip(*segments, strict=True))  # [P + S, G, C]
        queries = q[tokens].unflatten(1, (k.shape[1], -1))  # [S, G, heads, C]
        scores = torch.einsum("sghc,tgc->ghst", queries, keys) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[2:]).triu(len(keys) - length + 1).bool()
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("ghst,tgc->sghc", weights, values).flatten(1, 2))
    return torch.cat(outputs)


def tensors(lengths, n, g, c, p, dtype, prefix_dtype=None):
    """q, k, v, prefix_k, prefix_v: the same numbers on every device."""

    def draw(*shape, dtype=dtype):
        x = torch.randn(shape, device="cpu").to(torch.get_default_device(), dtype)
        return x.requires_grad_()

    t = sum(lengths)
    q, k, v = (draw(t, heads, c) for heads in (n, g, g))
    return q, k, v, *(draw(p, g, c, dtype=prefix_dtype or dtype) for _ in range(2))


def attend(lengths, **options):
    return lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths), **options)


def case_id(case):
    lengths, *sizes = case
    shown = lengths if len(lengths) < 5 else f"{len(lengths)} sequences"
    return f"{shown}-{sizes}"


def log_sum_exp(q, k, prefix_k):
    """Of one sequence's scores over prefix and tokens, [tokens, heads]."""
    keys = torch.cat([prefix_k, k]).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("tnc,snc->tns", q, keys) * q.shape[-1] ** -0.5
    ahead = torch.ones(len(q), len(keys)).triu(len(prefix_k) + 1).bool().unsqueeze(1)
    return scores.masked_fill(ahead, float("-inf")).logsumexp(-1)


def launched_kernels(monkeypatch) -> list[str]:
    """The names of the Triton kernels that the rest of the test launches, as they come."""
    names = []
    for file in FILES:

        def keep(kernel, *args, _launch=file.launch, **options):
            names.append(kernel.__name__)
            _launch(kernel, *args, **options)

        monkeypatch.setattr(file, "launch", keep)
    return names
