"""prefix_attention_decode: numbers, errors, and what only a kernel can get wrong."""

import pytest
import torch

from glmkern import ops
from tests.backends import slow
from tests.ops.attention import dense, launched_kernels, tensors
from tests.ops.numerics import (
    FORWARD,
    HALF_AND_SINGLE,
    assert_close_to_fp64,
    poisoned_memory,
    same_bits,
)

OP = "prefix_attention_decode_fwd"


def decoding(cached, new, sizes, dtype, length, width):
    """Caches with NaN behind their entries, slices of a wider tensor, and queries with NaN behind
    theirs; and by row what comes out in float64 and in dtype."""
    (n, g, c, p), batch = sizes, len(cached)
    q, k, v, pk, pv = (x.detach() for x in tensors(cached, n, g, c, p, dtype))
    caches = torch.full((batch, 2, length, g, c), torch.nan, dtype=dtype).unbind(1)
    queries = torch.full((batch, width, n, c), torch.nan, dtype=dtype)
    for b, rows in enumerate(torch.arange(sum(cached)).split(cached)):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[b, : cached[b]] = x[rows]
        queries[b, : new[b]] = q[rows[-new[b] :]]
    expected = [
        dense(*(x.to(t) for x in (q, k, v, pk, pv)), cached).split(cached)
        for t in (torch.float64, dtype)
    ]
    return (queries, *caches, torch.tensor(cached), pk, pv), expected


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("cached", "new", "sizes"),
    [
        ([7, 1, 12], [3, 1, 2], (4, 2, 6, 0)),
        ([7, 1, 12], [3, 1, 2], (6, 2, 6, 5)),
        ([300, 170, 3], [4, 1, 3], (16, 2, 10, 20)),  # keys are split; not the prefix
        ([90, 40], [1, 1], (16, 1, 32, 150)),  # the prefix is split too
        ([34, 30], [20, 13], (32, 1, 10, 20)),  # more rows than are split
        slow([7, 1, 12], [3, 1, 2], (4, 2, 6, 5)),
        slow([1500, 700, 3], [4, 1, 3], (16, 2, 10, 20)),
        slow([600, 40], [40, 33], (16, 2, 10, 20)),
    ],
    ids=str,
)
def test_decode_against_fp64(backend, cached, new, sizes, dtype):
    inputs, (exact, theirs) = decoding(cached, new, sizes, dtype, max(cached) + 20, max(new) + 2)
    with poisoned_memory():
        out = ops.prefix_attention_decode(*inputs, q_lens=torch.tensor(new))
    for b, count in enumerate(new):
        assert_close_to_fp64(out[b, :count], exact[b][-count:], theirs[b][-count:], FORWARD)
        assert (out[b, count:] == 0).all()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_bits_depend_on_the_row_alone_for_any_number_of_threads(backend, threads, dtype):
    caches = torch.randn(2, 3, 1100, 2, 12).to(dtype)
    q, prefix = torch.randn(3, 5, 8, 12).to(dtype), torch.randn(2, 30, 2, 12).to(dtype)
    lens, q_lens = torch.tensor([1100, 40, 600]), torch.tensor([5, 2, 1])

    def run(number, rows=slice(0, 3)):
        threads(number)
        with poisoned_memory():
            return ops.prefix_attention_decode(
                q[rows], *caches[:, rows], lens[rows], *prefix, q_lens=q_lens[rows]
            )

    first = run(1)
    for number in (1, 2, 3):
        assert same_bits(run(number), first)
        for b in range(3):
            assert same_bits(run(number, slice(b, b + 1)), first[b : b + 1])


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_decode_depend_on_the_row_alone(backend, dtype):
    caches = torch.randn(2, 3, 300, 2, 12).to(dtype)
    q, prefix = torch.randn(3, 5, 8, 12).to(dtype), torch.randn(2, 30, 2, 12).to(dtype)
    lens, q_lens = torch.tensor([300, 40, 160]), torch.tensor([5, 2, 1])

    def run(rows):
        with poisoned_memory():
            return ops.prefix_attention_decode(
                q[rows], *caches[:, rows], lens[rows], *prefix, q_lens=q_lens[rows]
            )

    together = run(slice(0, 3))
    assert same_bits(run(slice(0, 3)), together)
    for b in range(3):
        assert same_bits(run(slice(b, b + 1)), together[b : b + 1])


@pytest.mark.backends("triton")
def test_decode_launches(backend, monkeypatch):
    """One kernel for a short cache, another to combine where keys are split."""
    launched = launched_kernels(monkeypatch)
    q, lens = torch.randn(1, 1, 2, 4), torch.tensor([9])
    for length, names in ((100, []), (1000, ["prefix_attention_decode_combine_kernel"])):
        launched.clear()
        cache = torch.randn(1, length, 1, 4)
        ops.prefix_attention_decode(q, cache, cache, lens)
        assert launched == ["prefix_attention_decode_kernel", *names]


def test_decode_caches_must_agree():
    with pytest.raises(ValueError, match=r"the caches \[B, L, G, C\], not .* and \(5, 2, 2, 6\)"):
        ops.prefix_attention_decode(
            torch.zeros(2, 3, 4, 6),
            torch.zeros(2, 5, 2, 6),
            torch.zeros(5, 2, 2, 6),
            torch.tensor([5, 5]),
        )


@pytest.mark.parametrize(
    ("cache_lens", "q_lens"),
    [([6, 1], [1, 1]), ([3, 1], [1, 2]), ([3, 1], [0, 1]), ([5, 5], [4, 1])],
)
def test_decode_lengths_must_fit(backend, checked_values, cache_lens, q_lens):
    with pytest.raises(ValueError, match="1 <= queries <= entries must hold"):
        ops.prefix_attention_decode(
            torch.zeros(2, 3, 4, 6),
            torch.zeros(2, 5, 2, 6),
            torch.zeros(2, 5, 2, 6),
            torch.tensor(cache_lens),
            q_lens=torch.tensor(q_lens),
        )
