"""prefix_attention and its decode form against float64, masks, registration and errors."""

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import (
    FORWARD,
    HALF_AND_SINGLE,
    assert_close_to_fp64,
    matches_fp64,
    same_bits,
)

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
            prefix = [x if factor is None else x * factor[b, i].to(x.dtype)
                      for i, x in enumerate((prefix_k.to(q.dtype), prefix_v.to(q.dtype)))]
            segments.insert(0, prefix)
        keys, values = (torch.cat(x) for x in zip(*segments, strict=True))  # [P + S, G, C]
        queries = q[tokens].unflatten(1, (k.shape[1], -1))  # [S, G, heads, C]
        scores = torch.einsum("sghc,tgc->ghst", queries, keys) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[2:]).triu(len(keys) - length + 1).bool()
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("ghst,tgc->sghc", weights, values).flatten(1, 2))
    return torch.cat(outputs)


def tensors(lengths, n, g, c, p, dtype, prefix_dtype=None):
    t = sum(lengths)
    q, k, v = (torch.randn(t, h, c).to(dtype).requires_grad_() for h in (n, g, g))
    prefix = [torch.randn(p, g, c).to(prefix_dtype or dtype).requires_grad_() for _ in range(2)]
    return q, k, v, *(prefix if p is not None else (None, None))


CASES = [  # lengths, N, G, C, P
    ([1], 1, 1, 2, 1),
    ([5, 1, 9], 4, 2, 6, 3),
    ([3, 17], 4, 4, 8, 0),
    ([33, 2, 1, 30], 8, 1, 16, 7),
    ([19], 6, 3, 10, 40),
]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case, dtype):
    lengths = case[0]
    matches_fp64(lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths)),
                 lambda *x: dense(*x, lengths), lambda: tensors(*case, dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_without_prefix(dtype):
    lengths = [5, 1, 9]
    matches_fp64(lambda *x: ops.prefix_attention(*x, cu_seqlens=cumulative(lengths)),
                 lambda *x: dense(*x, None, None, lengths),
                 lambda: tensors(lengths, 4, 2, 6, 1, dtype)[:3])


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_dropout_against_fp64(dtype):
    lengths, (p, g, c) = [5, 1, 9], (6, 2, 10)
    ids, rate = torch.tensor([4, 0, 2]), 0.3
    keep = keep_mask(SEED, ids, 2 * p * g * c, rate).view(3, 2, p, g, c)

    def kernel(*x):
        return ops.prefix_attention(*x, cu_seqlens=cumulative(lengths), prefix_dropout=rate,
                                    seed=SEED, sequence_ids=ids)

    matches_fp64(kernel, lambda *x: dense(*x, lengths, keep / (1 - rate)),
                 lambda: tensors(lengths, 4, g, c, p, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_prefix_beside_half_tokens(dtype):
    lengths = [5, 1, 9]
    inputs = tensors(lengths, 4, 2, 6, 3, dtype, torch.float32)
    mixed = torch.autograd.grad(
        ops.prefix_attention(*inputs, cu_seqlens=cumulative(lengths)).sum(), inputs)
    assert [g.dtype for g in mixed] == [dtype] * 3 + [torch.float32] * 2
    rounded = [x.detach().to(dtype).requires_grad_() for x in inputs]
    half = torch.autograd.grad(
        ops.prefix_attention(*rounded, cu_seqlens=cumulative(lengths)).sum(), rounded)
    for a, b in zip(mixed, half, strict=True):
        assert same_bits(a.to(dtype), b)


def test_packing_changes_nothing():
    lengths, order = [4, 1, 7], [2, 0, 1]
    q, k, v, pk, pv = tensors(lengths, 4, 2, 8, 5, torch.float32)
    pieces = [x.split(lengths) for x in (q, k, v)]
    options = dict(prefix_dropout=0.2, seed=SEED)
    together = ops.prefix_attention(
        *(torch.cat([x[i] for i in order]) for x in pieces), pk, pv,
        cu_seqlens=cumulative([lengths[i] for i in order]), sequence_ids=torch.tensor(order),
        **options)
    alone = [ops.prefix_attention(*(x[i] for x in pieces), pk, pv,
                                  sequence_ids=torch.tensor([i]), **options) for i in order]
    assert same_bits(together, torch.cat(alone))


def test_log_sum_exp_is_natural():
    q, k, v, pk, pv = tensors([9], 4, 2, 6, 5, torch.float32)
    _, lse = ops.prefix_attention(q, k, v, pk, pv, return_lse=True)
    keys = torch.cat([pk, k]).repeat_interleave(2, 1)
    scores = torch.einsum("tnc,snc->tns", q, keys) * 6 ** -0.5
    ahead = torch.ones(9, 14).triu(6).bool().unsqueeze(1)
    expected = scores.masked_fill(ahead, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, expected)
    assert not lse.requires_grad


def test_only_what_is_asked_for_is_computed():
    inputs = [x.detach() for x in tensors([5, 3], 4, 2, 6, 3, torch.float32)]
    out, lse = ops.prefix_attention(*inputs, cu_seqlens=cumulative([5, 3]), return_lse=True)
    call = (torch.randn_like(out), *inputs, out, lse, cumulative([5, 3]), torch.arange(2), None,
            6 ** -0.5, 0.0)
    everything = torch.ops.glmkern.prefix_attention_bwd(*call, True, True)
    prefix_alone = torch.ops.glmkern.prefix_attention_bwd(*call, False, True)
    assert [x.numel() for x in prefix_alone[:3]] == [0, 0, 0]
    assert all(same_bits(a, b) for a, b in zip(prefix_alone[3:], everything[3:], strict=True))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("prefix", [0, 5])
def test_decode_against_fp64(dtype, prefix):
    cached, new = [7, 1, 12], [3, 1, 2]
    q, k, v, pk, pv = (x.detach() for x in tensors(cached, 4, 2, 6, prefix, dtype))
    caches = [torch.full((3, 13, 2, 6), float("nan"), dtype=dtype) for _ in range(2)]
    queries = torch.full((3, 3, 4, 6), float("nan"), dtype=dtype)
    for b, rows in enumerate(torch.arange(sum(cached)).split(cached)):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[b, :cached[b]] = x[rows]
        queries[b, :new[b]] = q[rows[-new[b]:]]
    out = ops.prefix_attention_decode(queries, *caches, torch.tensor(cached), pk, pv,
                                      q_lens=torch.tensor(new))
    exact, theirs = (dense(*(x.to(t) for x in (q, k, v, pk, pv)), cached).split(cached)
                     for t in (torch.float64, dtype))
    for b in range(3):
        assert_close_to_fp64(out[b, :new[b]], exact[b][-new[b]:], theirs[b][-new[b]:], FORWARD)
        assert (out[b, new[b]:] == 0).all()


def test_registration():
    cu, ids = cumulative([3, 2]), torch.arange(2)
    inputs = tensors([3, 2], 4, 2, 6, 3, torch.float32)
    for p in (0.0, 0.25):
        check_registration(torch.ops.glmkern.prefix_attention_fwd.default,
                           (*inputs, cu, ids, SEED, 0.5, p))
    values = [x.detach() for x in inputs]
    out, lse = torch.ops.glmkern.prefix_attention_fwd(*values, cu, ids, SEED, 0.5, 0.25)
    for token_grad, prefix_grad in ((True, True), (False, True), (True, False)):
        check_registration(torch.ops.glmkern.prefix_attention_bwd.default,
                           (torch.randn_like(out), *values, out, lse, cu, ids, SEED, 0.5, 0.25,
                            token_grad, prefix_grad))
    caches = torch.randn(2, 2, 5, 2, 6)
    lens = torch.tensor([5, 4])
    check_registration(torch.ops.glmkern.prefix_attention_decode_fwd.default,
                       (torch.randn(2, 3, 4, 6), *caches, lens, *values[3:],
                        torch.tensor([3, 1]), 0.5))
    check_compiles(lambda q, k, v: ops.prefix_attention(q, k, v, *values[3:]),
                   [tensors([n], 4, 2, 6, 3, torch.float32)[:3] for n in (5, 8)])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(q=zeros(5, 3, 6)), "query heads, 3, must be a multiple of the number of groups, 2"),
    (dict(q=zeros(4, 4, 6)), "q has 4 tokens and k 5"),
    (dict(k=zeros(5, 2, 4)), r"q must be \[T, N, C\] and k, v \[T, G, C\]"),
    (dict(v=zeros(5, 2, 6, dtype=torch.float16)), "v is float16 but q is float32"),
    (dict(prefix_k=zeros(3, 2, 6)), "give both prefix_k and prefix_v, or neither"),
    (dict(prefix_k=zeros(3, 1, 6), prefix_v=zeros(3, 1, 6)), r"must be \[P, 2, 6\]"),
    (dict(prefix_k=zeros(3, 2, 6, dtype=torch.float16),
          prefix_v=zeros(3, 2, 6, dtype=torch.float16)), "prefix must be float32 or q's"),
    (dict(prefix_dropout=0.5), "dropout needs seed"),
    (dict(prefix_dropout=-0.5, seed=SEED), r"must be in \[0, 1\), not -0.5"),
    (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens must be an int32 tensor"),
    (dict(cu_seqlens=cumulative([2, 0, 3])), "sequence 1 is empty .* leave it out"),
    (dict(cu_seqlens=cumulative([2, 2])), "number of tokens, 5, not from 0 to 4"),
    (dict(sequence_ids=torch.arange(3)), r"sequence_ids must be an int64 tensor \[1\]"),
])
def test_errors(arguments, sentence):
    call = dict(q=zeros(5, 4, 6), k=zeros(5, 2, 6), v=zeros(5, 2, 6)) | arguments
    with pytest.raises(ValueError, match=sentence):
        ops.prefix_attention(**call)


def test_decode_caches_must_agree():
    with pytest.raises(ValueError, match=r"the caches \[B, L, G, C\], not .* and \(5, 2, 2, 6\)"):
        ops.prefix_attention_decode(zeros(2, 3, 4, 6), zeros(2, 5, 2, 6), zeros(5, 2, 2, 6),
                                    torch.tensor([5, 5]))


@pytest.mark.parametrize(("cache_lens", "q_lens"), [([6, 1], [1, 1]), ([3, 1], [1, 2]),
                                                    ([3, 1], [0, 1]), ([5, 5], [4, 1])])
def test_decode_lengths_must_fit(cache_lens, q_lens):
    with pytest.raises(ValueError, match="1 <= queries <= entries must hold"):
        ops.prefix_attention_decode(zeros(2, 3, 4, 6), zeros(2, 5, 2, 6), zeros(2, 5, 2, 6),
                                    torch.tensor(cache_lens), q_lens=torch.tensor(q_lens))
