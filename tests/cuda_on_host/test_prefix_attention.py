"""The CUDA kernels of prefix_attention on the CPU, beyond the tests that all backends share: both
generations of tensor cores and plain float arithmetic, forced splits, unaligned and strided
tensors, the bits of masks."""

import math

import pytest
import torch

from glmkern.ops.philox import keep_mask
from tests.cuda_on_host.sanitized import unaligned
from tests.ops.attention import SEED, case_id, cumulative, dense, tensors
from tests.ops.numerics import matches_fp64, poisoned_memory, same_bits

# By the code's version: both generations of tensor cores, and float arithmetic.
CODE = [(75, torch.float16), (80, torch.float16), (80, torch.bfloat16), (80, torch.float32)]
CASES = [  # lengths, N, G, C, P
    ([200, 1, 37], 8, 2, 64, 7),
    ([33, 1, 90], 4, 4, 20, 1),
    ([5, 170], 3, 1, 16, 0),
    ([9, 40], 32, 2, 128, 128),
    ([70], 3, 1, 128, 7),
    ([1, 12], 32, 2, 20, 128),
    ([66, 3], 4, 4, 128, 1),
    ([2, 51], 8, 2, 16, 128),
    ([40, 1], 32, 2, 64, 0),
]


def attention(kernels, lengths, p=0.0, seed=None, ids=None, scale=None, place=torch.Tensor.clone):
    """q, k, v, prefix_k, prefix_v -> out, both passes by the kernels on copies by `place`."""
    batch = cumulative(lengths), torch.arange(len(lengths)) if ids is None else ids, seed

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.scale = inputs[0].shape[2] ** -0.5 if scale is None else scale
            out, lse = kernels.prefix_attention_fwd(*map(place, inputs), *batch, ctx.scale, p)
            ctx.save_for_backward(*inputs, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            *inputs, out, lse = ctx.saved_tensors
            call = place(dout), *map(place, inputs), place(out), place(lse), *batch, ctx.scale, p
            return kernels.prefix_attention_bwd(*call, True, True)

    return Attention.apply


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_fp64(kernels, machine, case, version, dtype):
    with machine.code_version(version):
        matches_fp64(
            attention(kernels, case[0]),
            lambda *x: dense(*x, case[0]),
            lambda: tensors(*case, dtype),
        )


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
@pytest.mark.parametrize("growth", [3, 7.5, 40])
def test_maxima_that_grow(kernels, machine, growth, version, dtype):
    """Of a row's exponents of 2, from each 16 keys to the next: by less than what its running
    maximum may lag behind, by nearly that, and by more."""
    lengths, n, g, c, p = case = [100, 30], 8, 2, 64, 40

    def inputs():
        q, k, v, pk, pv = (x.detach() for x in tensors(*case, torch.float32))
        ramp = growth / 16 * math.log(2) * c**-0.5  # of a key's channels, for scores of 1 a key
        q = 1 + 0.1 * q
        k = 0.1 * k + ramp * torch.arange(p, p + sum(lengths))[:, None, None]
        pk = 0.1 * pk + ramp * torch.arange(p)[:, None, None]
        return [x.to(dtype).requires_grad_() for x in (q, k, v, pk, pv)]

    with machine.code_version(version):
        matches_fp64(attention(kernels, lengths), lambda *x: dense(*x, lengths), inputs)


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_in_splits(kernels, machine, rate, splits, version, dtype):
    """Of unequal length, some empty; and all rows of a key in one block."""
    lengths, n, g, c, p = case = [60, 1, 44], 8, 2, 24, 70
    seed, ids = torch.tensor(SEED), torch.tensor([5, 2**32 - 1, 0])
    keep = keep_mask(seed, ids, 2 * p * g * c, rate).view(3, 2, p, g, c)
    with machine.code_version(version), machine.splits(splits):
        matches_fp64(
            attention(kernels, lengths, rate, seed, ids),
            lambda *x: dense(*x, lengths, keep / (1 - rate)),
            lambda: tensors(*case, dtype, torch.float32),
        )


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
@pytest.mark.parametrize("splits", [0, 1, 2, 9])
@pytest.mark.parametrize(
    ("queries", "heads", "groups", "channels", "prefix"),
    [
        (1, 32, 2, 128, 128),
        (3, 8, 2, 20, 7),
        (8, 32, 2, 64, 1),
        (2, 3, 1, 16, 0),
        (5, 4, 4, 128, 7),
    ],
)
def test_decoding(
    kernels, machine, queries, heads, groups, channels, prefix, splits, version, dtype
):
    """One to eight queries a row over a cache of 1 to 200 entries, laid out with room to spare."""
    scale, rows, room = channels**-0.5, 3, 203
    lens = torch.tensor([200, queries, 65]), torch.tensor([(queries + 1) // 2, 1, queries])

    def decode(q, cache, pk, pv):
        k, v = cache.unbind(2)
        return kernels.prefix_attention_decode_fwd(q, k, v, lens[0], pk, pv, lens[1], scale)

    def formula(q, cache, pk, pv):
        out = torch.zeros_like(q)
        for b, (length, new) in enumerate(zip(*(x.tolist() for x in lens), strict=True)):
            # the formula wants as many queries as keys: those before the new ones are thrown away
            padded = torch.cat([q.new_zeros(length - new, heads, channels), q[b, :new]])
            k, v = cache[b, :length].unbind(1)
            out[b, :new] = dense(padded, k, v, pk, pv, [length])[-new:]
        return out

    def inputs():
        shapes = [(rows, queries, heads, channels), (rows, room, 2, groups, channels)]
        shapes += [(prefix, groups, channels)] * 2
        return [torch.randn(shape).to(dtype) for shape in shapes]

    with machine.code_version(version), machine.splits(splits):
        matches_fp64(decode, formula, inputs)


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
def test_unaligned_tensors(kernels, machine, version, dtype):
    """The same bits as with 16-byte accesses."""
    lengths, *sizes = [25, 70], 8, 2, 64, 20
    inputs = [x.detach() for x in tensors(lengths, *sizes, dtype)]
    dout = torch.randn_like(inputs[0])
    with machine.code_version(version), poisoned_memory():
        first, second = (
            run_both_passes(attention(kernels, lengths, place=place), inputs, dout)
            for place in (torch.Tensor.clone, unaligned)
        )
    assert all(map(same_bits, first, second))


def run_both_passes(function, inputs, dout):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
def test_strides(kernels, machine, version, dtype):
    """Slices of one wider row, of which 16-byte accesses fit some and not others."""
    n, g, c, lengths = 4, 2, 16, [20, 9]
    prefix = torch.randn(2, 3, g, c).to(dtype)
    batch = cumulative(lengths), torch.arange(2), None, c**-0.5, 0.0
    for width, first in ((n + 2 * g, 0), (n + 2 * g + 1, 1)):
        for extra in (0, 3):
            wide = (
                torch.randn(29, width * c + extra).to(dtype)[:, : width * c].unflatten(1, (-1, c))
            )
            slices = wide[:, first:].split([n, g, g], 1)
            dout = torch.randn(29, n * c + extra).to(dtype)[:, : n * c].unflatten(1, (n, c))
            with machine.code_version(version), poisoned_memory():
                forward = kernels.prefix_attention_fwd(*slices, *prefix, *batch)
                backward = kernels.prefix_attention_bwd(
                    dout, *slices, *prefix, *forward, *batch, True, True
                )
                copies = [x.contiguous() for x in slices]
                expected = kernels.prefix_attention_fwd(*copies, *prefix, *batch)
                dense_backward = kernels.prefix_attention_bwd(
                    dout.contiguous(), *copies, *prefix, *expected, *batch, True, True
                )
            assert all(map(same_bits, [*forward, *backward], [*expected, *dense_backward]))


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
@pytest.mark.parametrize("channels", [64, 17])
@pytest.mark.parametrize("sequence_id", [3, 2**32 - 1])
def test_dropout_draws_the_same_bits(kernels, machine, sequence_id, channels, version, dtype):
    """The gradient of the prefix's values, sums of positive numbers, is zero where an element was
    dropped, and only there."""
    p, g, rate = 40, 2, 0.7
    seed, ids = torch.tensor(SEED), torch.tensor([sequence_id])
    keep = keep_mask(seed, ids, 2 * p * g * channels, rate).view(2, p, g, channels)
    inputs = [x.detach() for x in tensors([9], 4, g, channels, p, dtype, torch.float32)]
    batch = cumulative([9]), ids, seed, 1e-3, rate
    with machine.code_version(version), poisoned_memory():
        out, lse = kernels.prefix_attention_fwd(*inputs, *batch)
        dout = torch.rand_like(out) + 1
        *_, dk, dv = kernels.prefix_attention_bwd(dout, *inputs, out, lse, *batch, False, True)
    assert dv.ne(0).equal(keep[1])
    assert not dk[~keep[0]].any()


@pytest.mark.parametrize(
    ("version", "dtype", "channels", "p", "how"),
    [
        (75, torch.float16, 128, 0.0, "mma"),
        (80, torch.bfloat16, 64, 0.0, "mma"),
        (75, torch.bfloat16, 64, 0.0, "scalar"),
        (80, torch.float32, 64, 0.0, "scalar"),
        (80, torch.float16, 136, 0.5, "scalar"),
    ],
    ids=str,
)
def test_choice(kernels, machine, version, dtype, channels, p, how):
    """Of kernels; the prefix alone needs no gradient of queries."""
    lengths, seed = [9, 3], torch.tensor(SEED)
    q, k, v, *prefix = (x.detach() for x in tensors(lengths, 4, 2, channels, 8, dtype))
    batch = cumulative(lengths), torch.arange(2), seed, 0.1, p
    with machine.code_version(version), machine.counting() as counted:
        out, lse = kernels.prefix_attention_fwd(q, k, v, *prefix, *batch)
        kernels.prefix_attention_bwd(out, q, k, v, *prefix, out, lse, *batch, False, True)
    found = {name.split("_kernel")[0] for name in counted}
    gradients = {"mma": "gradients_mma", "scalar": "key_gradients_scalar"}[how]
    dropped = {"prepare_prefix", "add_dropped"} if p > 0 else {"add_splits"}
    assert found == {f"attend_{how}", "row_numbers", gradients} | dropped


@pytest.mark.parametrize(("version", "dtype"), CODE, ids=str)
def test_nothing_to_attend_to(kernels, machine, version, dtype):
    """No tokens, or no rows of a batch."""
    q, k = torch.empty(0, 4, 16).to(dtype), torch.empty(0, 2, 16).to(dtype)
    prefix = torch.randn(2, 3, 2, 16).to(dtype)
    batch = cumulative([0]), torch.arange(1), None, 0.25, 0.0
    with machine.code_version(version), poisoned_memory():
        out, lse = kernels.prefix_attention_fwd(q, k, k, *prefix, *batch)
        assert out.shape == q.shape and lse.shape == (0, 4)
        lens = torch.empty(0, dtype=torch.int64)
        shapes = [torch.empty(0, 1, heads, 16).to(dtype) for heads in (4, 2, 2)]
        decoded = kernels.prefix_attention_decode_fwd(*shapes, lens, *prefix, lens, 0.25)
        assert decoded.shape == (0, 1, 4, 16)
        grads = kernels.prefix_attention_bwd(q, q, k, k, *prefix, out, lse, *batch, True, True)
    assert [len(x) for x in grads] == [0, 0, 0, 3, 3]
    assert not any(x.any() for x in grads[3:])
