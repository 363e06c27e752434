"""prefix_attention: numbers, dropout, packing, layouts, errors. Its decode form:
test_prefix_attention_decode.py."""

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from tests.backends import slow
from tests.ops.attention import SEED, attend, case_id, cumulative, dense, log_sum_exp, tensors
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

OP = "prefix_attention_fwd"
library = torch.ops.glmkern
LONG = [300, 1, 70]  # its gradients are summed in several pieces, some of two sequences
CASES = [  # lengths, N, G, C, P
    ([1], 1, 1, 100, 1),
    ([1] * 10, 2, 1, 10, 10),
    ([5, 1, 9], 4, 2, 17, 3),
    ([3, 17], 4, 4, 8, 0),
    ([33, 2, 1, 30], 8, 1, 16, 7),
    ([19], 6, 3, 10, 40),
    ([7], 32, 2, 128, 40),
    ([60, 1, 8], 4, 1, 10, 10),  # the prefix's sums are divided, one over three sequences
    # In some of these, a tensor is so small that its largest error is luck on coarser tiles.
    slow(([1], 1, 1, 2, 1)),
    slow(([2], 2, 1, 70, 0)),
    slow(([5, 1, 9], 4, 2, 6, 3)),
    slow(([2, 4], 3, 1, 1, 2)),
    slow(([9, 30], 32, 2, 128, 17)),
    slow(([40], 32, 2, 128, 130)),
    slow((LONG, 6, 3, 10, 5)),
    slow(([1 + i * 7 % 13 for i in range(40)], 16, 2, 8, 3)),
]
# An interpreter is slow, and float16 shows it nothing that bfloat16 does not.
DTYPES = [torch.float32, torch.bfloat16, slow(torch.float16)]


@pytest.fixture
def seed(backend):
    return torch.tensor(SEED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_fp64(backend, case, dtype):
    lengths = case[0]
    matches_fp64(attend(lengths), lambda *x: dense(*x, lengths), lambda: tensors(*case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(backend, dtype):
    """The result is its value. The gradients of query and key are differences of equal sums, which
    PyTorch's softmax of one number makes exactly zero: here, what rounding leaves of them."""
    q, k, v = inputs = tensors([1], 2, 1, 70, 0, dtype)[:3]
    out = attend([1])(*inputs)
    assert out.equal(v.expand_as(out))
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, inputs, dout)
    dense_dv = torch.autograd.grad(dense(q, k, v, None, None, [1]), v, dout)
    assert dv.equal(*dense_dv)
    terms = (dout * v).abs().float().sum(-1, keepdim=True) * 70**-0.5
    eps = 4 * torch.finfo(torch.float32).eps
    assert (dq.float().abs() <= eps * terms * k.abs() + torch.finfo(dtype).tiny).all()
    assert (dk.float().abs() <= eps * (terms * q.abs()).sum(1) + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("size", [10, 1000])
@pytest.mark.parametrize("lengths", [[25, 7], slow([40, 7])], ids=str)
def test_weights_of_almost_one_key(backend, lengths, size):
    """Scores so far apart that most weights are 0."""

    def inputs():
        q, *rest = tensors(lengths, 4, 2, 16, 9, torch.float32)
        return (q.detach() * size).requires_grad_(), *rest

    if size == 10:
        matches_fp64(attend(lengths), lambda *x: dense(*x, lengths), inputs)
    leaves = inputs()
    out = attend(lengths)(*leaves)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("channels", [10, slow(6)])
def test_without_prefix(backend, channels, dtype):
    lengths = [5, 1, 9]
    matches_fp64(
        attend(lengths),
        lambda *x: dense(*x, None, None, lengths),
        lambda: tensors(lengths, 4, 2, channels, 1, dtype)[:3],
    )


def test_many_sequences(backend):
    """More than a program looks at together."""
    q, k, v, pk, pv = (x.detach() for x in tensors([1] * 129, 2, 1, 4, 5, torch.float32))
    out = attend([1] * 129)(q, k, v, pk, pv)
    torch.testing.assert_close(out, dense(q, k, v, pk, pv, [1] * 129))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scale_not_above_zero(backend, scale, dtype):
    """The largest score is then not that of the largest product."""

    def scaled(q, *rest):
        return dense(q * (scale * q.shape[-1] ** 0.5), *rest, [20, 9])

    matches_fp64(
        attend([20, 9], scale=scale), scaled, lambda: tensors([20, 9], 4, 2, 16, 18, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([5, 1, 9], (6, 2, 10)),
        ([5, 1, 9], (7, 1, 15)),
        ([60, 1, 8], (9, 1, 13)),
        slow([5, 1, 9], (3, 1, 5)),
        slow(LONG, (7, 1, 3)),
        slow([3] * 40, (5, 1, 12)),
    ],
    ids=["three", "rows of 15", "long", "rows of 5", "longer", "forty"],
)
def test_dropout_against_fp64(backend, seed, lengths, shape, dtype):
    (p, g, c), batch, rate = shape, len(lengths), 0.3
    ids = torch.arange(batch).flip(0) + 2**32 - batch
    keep = keep_mask(seed, ids, 2 * p * g * c, rate).view(batch, 2, p, g, c)
    matches_fp64(
        attend(lengths, prefix_dropout=rate, seed=seed, sequence_ids=ids),
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        lambda: tensors(lengths, 4 * g, g, c, p, dtype),
    )


@pytest.mark.parametrize("channels", [17, slow(8)])
def test_dropout_of_zeros(backend, seed, channels):
    """A zero that is kept has a gradient, a dropped one has none, whatever their signs."""
    lengths, rate = [5, 3], 0.4
    keep = keep_mask(seed, torch.arange(2), 2 * 6 * channels, rate).view(2, 2, 6, 1, channels)

    def inputs():
        *tokens, pk, pv = tensors(lengths, 4, 1, channels, 6, torch.float32)
        return *tokens, *((x.detach().sign() * 0.0).requires_grad_() for x in (pk, pv))

    matches_fp64(
        attend(lengths, prefix_dropout=rate, seed=seed),
        lambda *x: dense(*x, lengths, keep / (1 - rate)),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_float32_prefix_beside_half_tokens(backend, seed, dtype, rate):
    lengths = [5, 1, 9]
    inputs = tensors(lengths, 4, 2, 6, 3, dtype, torch.float32)
    rounded = [x.detach().to(dtype).requires_grad_() for x in inputs]
    mixed, half = (
        torch.autograd.grad(attend(lengths, prefix_dropout=rate, seed=seed)(*x).sum(), x)
        for x in (inputs, rounded)
    )
    assert [g.dtype for g in mixed] == [dtype] * 3 + [torch.float32] * 2
    for a, b in zip(mixed, half, strict=True):
        assert same_bits(a.to(dtype), b)


@pytest.mark.parametrize("lengths", [[4, 1, 7], [40, 1, 33], slow(LONG)], ids=str)
def test_packing_changes_nothing(backend, seed, lengths):
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


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("lengths", [[5, 3], slow(LONG)], ids=str)
def test_only_what_is_asked_for_is_computed(backend, seed, lengths, p):
    inputs = [x.detach() for x in tensors(lengths, 4, 2, 6, 3, torch.float32)]
    batch = (cumulative(lengths), torch.arange(len(lengths)), seed, 6**-0.5, p)
    out, lse = library.prefix_attention_fwd(*inputs, *batch)
    call = (torch.randn_like(out), *inputs, out, lse, *batch)
    everything = library.prefix_attention_bwd(*call, True, True)
    for token_grad, prefix_grad in ((False, True), (True, False), (False, False)):
        part = library.prefix_attention_bwd(*call, token_grad, prefix_grad)
        for i, (a, b) in enumerate(zip(part, everything, strict=True)):
            wanted = token_grad if i < 3 else prefix_grad
            assert same_bits(a, b) if wanted else a.numel() == 0


def test_slices_of_one_wider_row(backend):
    n, g, c, lengths = 4, 2, 6, [20, 9]
    qkv = torch.randn(29, n + 2 * g, c)
    slices = qkv[:, :n], qkv[:, n : n + g], qkv[:, n + g :]
    prefix = torch.randn(2, 3, g, c)
    batch = (cumulative(lengths), torch.arange(2), None, c**-0.5, 0.0)
    out, lse = library.prefix_attention_fwd(*slices, *prefix, *batch)
    copies = [x.contiguous() for x in slices]
    expected = library.prefix_attention_fwd(*copies, *prefix, *batch)
    assert all(map(same_bits, (out, lse), expected))
    dout = torch.randn(29, n + 1, c)[:, 1:]
    transposed = dout.transpose(1, 2).contiguous().transpose(1, 2)
    results, theirs, expected = (
        library.prefix_attention_bwd(d, *x, *prefix, out, lse, *batch, True, True)
        for d, x in ((dout, slices), (transposed, slices), (dout.contiguous(), copies))
    )
    assert all(map(same_bits, results, expected))
    assert all(map(same_bits, theirs, expected))


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    sentence = f"'{backend.name}' is forced, but cannot serve prefix_attention_fwd: float64"
    with pytest.raises(RuntimeError, match=sentence):
        ops.prefix_attention(*tensors([3], 2, 1, 4, 2, torch.float64))


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
        (dict(prefix_dropout=-0.5, seed=torch.tensor(SEED)), r"must be in \[0, 1\), not -0.5"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens must be an int32 tensor"),
        (dict(cu_seqlens=cumulative([2, 0, 3])), "sequence 1 is empty .* leave it out"),
        (dict(cu_seqlens=cumulative([2, 2])), "number of tokens, 5, not from 0 to 4"),
        (dict(sequence_ids=torch.arange(3)), r"sequence_ids must be an int64 tensor \[1\]"),
    ],
)
def test_errors(backend, checked_values, arguments, sentence):
    call = dict(q=torch.zeros(5, 4, 6), k=torch.zeros(5, 2, 6), v=torch.zeros(5, 2, 6))
    with pytest.raises(ValueError, match=sentence):
        ops.prefix_attention(**call | backend.on_device(arguments))


@pytest.mark.parametrize("call", ["fwd", "bwd"])
def test_both_passes_check_sequences(backend, seed, call, monkeypatch):
    inputs = [x.detach() for x in tensors([5], 4, 2, 6, 3, torch.float32)]
    batch = torch.arange(1), seed, 6**-0.5, 0.0
    out, lse = library.prefix_attention_fwd(*inputs, cumulative([5]), *batch)
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    with pytest.raises(ValueError, match="number of tokens, 5, not from 0 to 4"):
        if call == "fwd":
            library.prefix_attention_fwd(*inputs, cumulative([4]), *batch)
        else:
            library.prefix_attention_bwd(
                out, *inputs, out, lse, cumulative([4]), *batch, True, True
            )
