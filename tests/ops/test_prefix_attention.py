"""prefix_attention and its decode form, reference and C++: numbers, masks, determinism,
registration, errors."""

import pytest
import torch

import glmkern
from glmkern import ops
from glmkern.ops.philox import keep_mask
from tests.ops.numerics import (
    FORWARD,
    HALF_AND_SINGLE,
    assert_close_to_fp64,
    matches_fp64,
    poisoned_memory,
    same_bits,
)

OP = "prefix_attention_fwd"
SEED = torch.tensor([0xFACE_FEED_1234, 3])


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


LONG = [300, 1, 70]  # its gradients are summed in several pieces, some of two sequences
CASES = [  # lengths, N, G, C, P
    ([1], 1, 1, 2, 1),
    ([1], 2, 1, 70, 0),
    ([5, 1, 9], 4, 2, 6, 3),
    ([3, 17], 4, 4, 8, 0),
    ([2, 4], 3, 1, 1, 2),
    ([33, 2, 1, 30], 8, 1, 16, 7),
    ([19], 6, 3, 10, 40),
    ([9, 30], 32, 2, 128, 17),
    ([40], 32, 2, 128, 130),
    (LONG, 6, 3, 10, 5),
    ([1 + i * 7 % 13 for i in range(40)], 16, 2, 8, 3),
]


def case_id(case):
    lengths, *sizes = case
    shown = lengths if len(lengths) < 5 else f"{len(lengths)} sequences"
    return f"{shown}-{sizes}"


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_fp64(backend, case, dtype):
    lengths = case[0]
    matches_fp64(
        lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths)),
        lambda *x: dense(*x, lengths),
        lambda: tensors(*case, dtype),
    )


@pytest.mark.parametrize("size", [10, 1000])
def test_weights_of_almost_one_key(backend, size):
    """Scores so far apart that most weights are 0."""

    def inputs():
        q, *rest = tensors([40, 7], 4, 2, 16, 9, torch.float32)
        return (q.detach() * size).requires_grad_(), *rest

    if size == 10:
        matches_fp64(
            lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative([40, 7])),
            lambda *x: dense(*x, [40, 7]),
            inputs,
        )
    leaves = inputs()
    out = ops.prefix_attention(*leaves, cu_seqlens=cumulative([40, 7]))
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_without_prefix(backend, dtype):
    lengths = [5, 1, 9]
    matches_fp64(
        lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths)),
        lambda *x: dense(*x, None, None, lengths),
        lambda: tensors(lengths, 4, 2, 6, 1, dtype)[:3],
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([5, 1, 9], (6, 2, 10)), ([5, 1, 9], (3, 1, 5)), (LONG, (7, 1, 3)), ([3] * 40, (5, 1, 12))],
    ids=["three", "rows of 5", "long", "forty"],
)
def test_dropout_against_fp64(backend, lengths, shape, dtype):
    (p, g, c), batch, rate = shape, len(lengths), 0.3
    ids = torch.arange(batch).flip(0) + 4
    keep = keep_mask(SEED, ids, 2 * p * g * c, rate).view(batch, 2, p, g, c)

    def kernel(*x):
        return ops.prefix_attention(
            *x, cu_seqlens=cumulative(lengths), prefix_dropout=rate, seed=SEED, sequence_ids=ids
        )

    matches_fp64(
        kernel,
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        lambda: tensors(lengths, 4 * g, g, c, p, dtype),
    )


def test_dropout_of_zeros(backend):
    """A zero that is kept has a gradient, a dropped one has none, whatever their signs."""
    lengths, rate = [5, 3], 0.4
    keep = keep_mask(SEED, torch.arange(2), 2 * 6 * 8, rate).view(2, 2, 6, 1, 8)

    def inputs():
        *tokens, pk, pv = tensors(lengths, 4, 1, 8, 6, torch.float32)
        return *tokens, *((x.detach().sign() * 0.0).requires_grad_() for x in (pk, pv))

    matches_fp64(
        lambda *x: ops.prefix_attention(
            *x, cu_seqlens=cumulative(lengths), prefix_dropout=rate, seed=SEED
        ),
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_prefix_beside_half_tokens(backend, dtype):
    lengths = [5, 1, 9]
    inputs = tensors(lengths, 4, 2, 6, 3, dtype, torch.float32)
    mixed = torch.autograd.grad(
        ops.prefix_attention(*inputs, cu_seqlens=cumulative(lengths)).sum(), inputs
    )
    assert [g.dtype for g in mixed] == [dtype] * 3 + [torch.float32] * 2
    rounded = [x.detach().to(dtype).requires_grad_() for x in inputs]
    half = torch.autograd.grad(
        ops.prefix_attention(*rounded, cu_seqlens=cumulative(lengths)).sum(), rounded
    )
    for a, b in zip(mixed, half, strict=True):
        assert same_bits(a.to(dtype), b)


@pytest.mark.parametrize("lengths", [[4, 1, 7], LONG], ids=str)
def test_packing_changes_nothing(backend, lengths):
    check_packing(lengths, SEED)


def check_packing(lengths, seed):
    """Three sequences have the same bits together, in another order, as alone."""
    order = [2, 0, 1]
    q, k, v, pk, pv = tensors(lengths, 4, 2, 8, 5, torch.float32)
    pieces = [x.split(lengths) for x in (q, k, v)]
    options = dict(prefix_dropout=0.2, seed=seed)
    together = ops.prefix_attention(
        *(torch.cat([x[i] for i in order]) for x in pieces),
        pk,
        pv,
        cu_seqlens=cumulative([lengths[i] for i in order]),
        sequence_ids=torch.tensor(order),
        **options,
    )
    alone = [
        ops.prefix_attention(
            *(x[i] for x in pieces), pk, pv, sequence_ids=torch.tensor([i]), **options
        )
        for i in order
    ]
    assert same_bits(together, torch.cat(alone))


def test_log_sum_exp_is_natural(backend):
    q, k, v, pk, pv = tensors([9], 4, 2, 6, 5, torch.float32)
    _, lse = ops.prefix_attention(q, k, v, pk, pv, return_lse=True)
    torch.testing.assert_close(lse, log_sum_exp(q, k, pk))
    assert not lse.requires_grad


def log_sum_exp(q, k, prefix_k):
    """Of one sequence's scores over prefix and tokens, [tokens, heads]."""
    keys = torch.cat([prefix_k, k]).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("tnc,snc->tns", q, keys) * q.shape[-1] ** -0.5
    ahead = torch.ones(len(q), len(keys)).triu(len(prefix_k) + 1).bool().unsqueeze(1)
    return scores.masked_fill(ahead, float("-inf")).logsumexp(-1)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [[5, 3], LONG], ids=str)
def test_only_what_is_asked_for_is_computed(backend, lengths, p):
    inputs = [x.detach() for x in tensors(lengths, 4, 2, 6, 3, torch.float32)]
    batch = (cumulative(lengths), torch.arange(len(lengths)), SEED, 6**-0.5, p)
    out, lse = torch.ops.glmkern.prefix_attention_fwd(*inputs, *batch)
    call = (torch.randn_like(out), *inputs, out, lse, *batch)
    everything = torch.ops.glmkern.prefix_attention_bwd(*call, True, True)
    for token_grad, prefix_grad in ((False, True), (True, False), (False, False)):
        part = torch.ops.glmkern.prefix_attention_bwd(*call, token_grad, prefix_grad)
        for i, (a, b) in enumerate(zip(part, everything, strict=True)):
            wanted = token_grad if i < 3 else prefix_grad
            assert same_bits(a, b) if wanted else a.numel() == 0


def test_slices_of_one_wider_row(backend):
    n, g, c, lengths = 4, 2, 6, [20, 9]
    qkv = torch.randn(29, n + 2 * g, c)
    slices = qkv[:, :n], qkv[:, n : n + g], qkv[:, n + g :]
    prefix = torch.randn(2, 3, g, c)
    batch = (cumulative(lengths), torch.arange(2), None, c**-0.5, 0.0)
    out, lse = torch.ops.glmkern.prefix_attention_fwd(*slices, *prefix, *batch)
    copies = [x.contiguous() for x in slices]
    expected = torch.ops.glmkern.prefix_attention_fwd(*copies, *prefix, *batch)
    assert all(map(same_bits, (out, lse), expected))
    dout = torch.randn(29, n + 1, c)[:, 1:]
    results, expected = (
        torch.ops.glmkern.prefix_attention_bwd(d, *x, *prefix, out, lse, *batch, True, True)
        for d, x in ((dout, slices), (dout.contiguous(), copies))
    )
    assert all(map(same_bits, results, expected))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_bits_do_not_depend_on_the_run_or_the_threads(threads, dtype, p):
    inputs = tensors(LONG, 8, 2, 20, 9, dtype)

    def run(number):
        threads(number)
        with poisoned_memory(), glmkern.backend("cpu"):
            out, lse = ops.prefix_attention(
                *inputs, cu_seqlens=cumulative(LONG), return_lse=True, prefix_dropout=p, seed=SEED
            )
            return out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    first = run(1)
    for number in (1, 2, 3):
        assert all(map(same_bits, run(number), first))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("prefix", [0, 5])
def test_decode_against_fp64(backend, dtype, prefix):
    cached, new = [7, 1, 12], [3, 1, 2]
    q, k, v, pk, pv = (x.detach() for x in tensors(cached, 4, 2, 6, prefix, dtype))
    caches = [torch.full((3, 13, 2, 6), float("nan"), dtype=dtype) for _ in range(2)]
    queries = torch.full((3, 3, 4, 6), float("nan"), dtype=dtype)
    for b, rows in enumerate(torch.arange(sum(cached)).split(cached)):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[b, : cached[b]] = x[rows]
        queries[b, : new[b]] = q[rows[-new[b] :]]
    out = ops.prefix_attention_decode(
        queries, *caches, torch.tensor(cached), pk, pv, q_lens=torch.tensor(new)
    )
    exact, theirs = (
        dense(*(x.to(t) for x in (q, k, v, pk, pv)), cached).split(cached)
        for t in (torch.float64, dtype)
    )
    for b in range(3):
        assert_close_to_fp64(out[b, : new[b]], exact[b][-new[b] :], theirs[b][-new[b] :], FORWARD)
        assert (out[b, new[b] :] == 0).all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("cached", "new"), [([1500, 700, 3], [4, 1, 3]), ([600, 40], [40, 33])], ids=str
)
def test_decode_over_long_caches(backend, cached, new, dtype):
    """Few queries, whose keys are split, and more than are split; caches are slices."""
    q, k, v, pk, pv = (x.detach() for x in tensors(cached, 16, 2, 10, 20, dtype))
    caches = torch.randn(len(cached), 2, 1600, 2, 10).to(dtype).unbind(1)
    queries = torch.randn(len(cached), 45, 16, 10).to(dtype)
    for b, rows in enumerate(torch.arange(sum(cached)).split(cached)):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[b, : cached[b]] = x[rows]
        queries[b, : new[b]] = q[rows[-new[b] :]]
    with poisoned_memory():
        out = ops.prefix_attention_decode(
            queries, *caches, torch.tensor(cached), pk, pv, q_lens=torch.tensor(new)
        )
    exact, theirs = (
        dense(*(x.to(t) for x in (q, k, v, pk, pv)), cached).split(cached)
        for t in (torch.float64, dtype)
    )
    for b in range(len(cached)):
        assert_close_to_fp64(out[b, : new[b]], exact[b][-new[b] :], theirs[b][-new[b] :], FORWARD)
        assert (out[b, new[b] :] == 0).all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_bits_of_decode_depend_on_the_row_alone(threads, dtype):
    caches = torch.randn(2, 3, 1100, 2, 12).to(dtype)
    q, prefix = torch.randn(3, 5, 8, 12).to(dtype), torch.randn(2, 30, 2, 12).to(dtype)
    lens, q_lens = torch.tensor([1100, 40, 600]), torch.tensor([5, 2, 1])

    def run(number, rows=slice(0, 3)):
        threads(number)
        with poisoned_memory(), glmkern.backend("cpu"):
            return ops.prefix_attention_decode(
                q[rows], *caches[:, rows], lens[rows], *prefix, q_lens=q_lens[rows]
            )

    first = run(1)
    for number in (1, 2, 3):
        assert same_bits(run(number), first)
        for b in range(3):
            assert same_bits(run(number, slice(b, b + 1)), first[b : b + 1])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(q=zeros(5, 3, 6)), "query heads, 3, must be a multiple of the number of groups, 2"),
        (dict(q=zeros(4, 4, 6)), "q has 4 tokens and k 5"),
        (dict(k=zeros(5, 2, 4)), r"q must be \[T, N, C\] and k, v \[T, G, C\]"),
        (dict(v=zeros(5, 2, 6, dtype=torch.float16)), "v is float16 but q is float32"),
        (dict(prefix_k=zeros(3, 2, 6)), "give both prefix_k and prefix_v, or neither"),
        (dict(prefix_k=zeros(3, 1, 6), prefix_v=zeros(3, 1, 6)), r"must be \[P, 2, 6\]"),
        (
            dict(
                prefix_k=zeros(3, 2, 6, dtype=torch.float16),
                prefix_v=zeros(3, 2, 6, dtype=torch.float16),
            ),
            "prefix must be float32 or q's",
        ),
        (dict(prefix_dropout=0.5), "dropout needs seed"),
        (dict(prefix_dropout=-0.5, seed=SEED), r"must be in \[0, 1\), not -0.5"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens must be an int32 tensor"),
        (dict(cu_seqlens=cumulative([2, 0, 3])), "sequence 1 is empty .* leave it out"),
        (dict(cu_seqlens=cumulative([2, 2])), "number of tokens, 5, not from 0 to 4"),
        (dict(sequence_ids=torch.arange(3)), r"sequence_ids must be an int64 tensor \[1\]"),
    ],
)
def test_errors(backend, arguments, sentence):
    call = dict(q=zeros(5, 4, 6), k=zeros(5, 2, 6), v=zeros(5, 2, 6)) | arguments
    with pytest.raises(ValueError, match=sentence):
        ops.prefix_attention(**call)


def test_decode_caches_must_agree():
    with pytest.raises(ValueError, match=r"the caches \[B, L, G, C\], not .* and \(5, 2, 2, 6\)"):
        ops.prefix_attention_decode(
            zeros(2, 3, 4, 6), zeros(2, 5, 2, 6), zeros(5, 2, 2, 6), torch.tensor([5, 5])
        )


@pytest.mark.parametrize(
    ("cache_lens", "q_lens"),
    [([6, 1], [1, 1]), ([3, 1], [1, 2]), ([3, 1], [0, 1]), ([5, 5], [4, 1])],
)
def test_decode_lengths_must_fit(backend, cache_lens, q_lens):
    with pytest.raises(ValueError, match="1 <= queries <= entries must hold"):
        ops.prefix_attention_decode(
            zeros(2, 3, 4, 6),
            zeros(2, 5, 2, 6),
            zeros(2, 5, 2, 6),
            torch.tensor(cache_lens),
            q_lens=torch.tensor(q_lens),
        )
