"""bias_dropout_add: numbers, masks, layouts, errors."""

import math

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from tests.backends import slow
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "bias_dropout_add_fwd"
SEED = (-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1)
# rows of less than a tile and of several tiles; of a multiple of four elements and not
SHAPES = [
    (5,),
    (3, 17),
    (63, 64),
    (2, 5, 100),
    (3, 1371),
    (2, 4096),
    *map(slow, [(1, 1), (7, 4099), (6, 30)]),
]
LENGTHS = [3, 1, 9, 4]
library = torch.ops.glmkern


@pytest.fixture
def seed(backend):
    return torch.tensor(SEED)


def sequences(lengths):
    """cu_seqlens, and ids that need all their bits."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.randint(2**31, 2**32, (len(lengths),))
    ids[-1], ids[0] = 0, 2**32 - 1
    return ends, ids


def expected_mask(seed, lengths, ids, hidden, p):
    return torch.cat(
        [
            keep_mask(seed, ids[b : b + 1], n * hidden, p).view(n, hidden)
            for b, n in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("p", "with_bias"), [(0.0, True), slow(0.0, False), (0.3, True), (0.3, False)]
)
def test_against_fp64(backend, seed, shape, dtype, with_bias, p):
    keep = keep_mask(seed, torch.tensor([0]), math.prod(shape), p).view(shape)

    def inputs():
        x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(shape[-1]).to(dtype).requires_grad_() if with_bias else None
        return x, bias, residual

    def formula(x, bias, residual):
        y = x if bias is None else x + bias
        return (y * keep / (1 - p) if p else y) + residual

    matches_fp64(lambda x, b, r: ops.bias_dropout_add(x, b, r, p, seed), formula, inputs)


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.7, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 36, 57, 1028, 1031])
def test_the_mask_is_the_contract_s(backend, seed, hidden, p):
    """Rows that start amid a counter, tiles with rows of several sequences."""
    cu_seqlens, ids = sequences(LENGTHS)
    ones = torch.ones(sum(LENGTHS), hidden)
    keep = expected_mask(seed, LENGTHS, ids, hidden, p).float() / (1 - p)
    with poisoned_memory():
        y = library.bias_dropout_add_fwd(ones, None, 0 * ones, p, seed, cu_seqlens, ids)
        dx, _ = library.bias_dropout_add_bwd(ones, p, seed, cu_seqlens, ids, True)
    if backend.name in ("cpu", "reference"):
        assert same_bits(y, keep)
    torch.testing.assert_close(y, keep, rtol=2e-7, atol=0)
    assert torch.equal(y != 0, keep != 0)
    assert same_bits(dx, y)


@pytest.mark.parametrize("packed", [[0, 1, 2], [2, 0, 1]], ids=str)
def test_packing_does_not_change_a_mask(backend, seed, packed):
    rows = [torch.randn(n, 20) for n in (4, 1, 6)]
    ids = torch.tensor([5, 0, 2])

    def drop(x, **options):
        return ops.bias_dropout_add(x, None, torch.zeros_like(x), 0.4, seed, **options)

    alone = [drop(x, sequence_ids=ids[i : i + 1]) for i, x in enumerate(rows)]
    cu_seqlens, _ = sequences([len(rows[i]) for i in packed])
    together = drop(
        torch.cat([rows[i] for i in packed]),
        cu_seqlens=cu_seqlens,
        sequence_ids=ids[torch.tensor(packed)],
    )
    assert same_bits(together, torch.cat([alone[i] for i in packed]))


def test_backward_draws_the_forward_mask(backend, seed):
    x = torch.ones(50, 33, requires_grad=True)
    y = ops.bias_dropout_add(x, None, torch.zeros_like(x), 0.5, seed)
    y.sum().backward()
    assert same_bits(x.grad, y.detach())


def test_evaluation_drops_nothing(backend):
    x = torch.randn(3, 5)
    assert same_bits(ops.bias_dropout_add(x, None, x, 0.9, None, training=False), x + x)


def test_no_rows(backend):
    x, bias = torch.randn(2, 0, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    y = ops.bias_dropout_add(x, bias, x.detach(), 0.0, None)
    assert y.shape == (2, 0, 6)
    assert same_bits(torch.autograd.grad(y.sum(), bias)[0], torch.zeros(6))


def test_inputs_with_strides(backend, seed):
    x, residual, bias = torch.randn(10, 6), torch.randn(10, 6), torch.randn(20)
    seeds = torch.stack([seed, seed + 1], 1)
    expected = ops.bias_dropout_add(
        x.t().contiguous(), bias[::2].contiguous(), residual.t().contiguous(), 0.3, seed
    )
    result = ops.bias_dropout_add(x.t(), bias[::2], residual.t(), 0.3, seeds[:, 0])
    assert same_bits(result, expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(residual=torch.zeros(2, 4)), "residual must have x's shape"),
        (
            dict(x=torch.zeros(3, 0), residual=torch.zeros(3, 0)),
            "a last dimension that is not empty",
        ),
        (dict(bias=torch.zeros(2)), r"bias must have shape \[3\]"),
        (dict(bias=torch.zeros(3, dtype=torch.float64)), "bias is float64 but x is float32"),
        (dict(p=1.0), r"must be in \[0, 1\), not 1.0"),
        (dict(seed=None), "dropout needs seed"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens must be an int32 tensor"),
        (
            dict(cu_seqlens=torch.tensor([0, 0, 2], dtype=torch.int32)),
            r"^bias_dropout_add: sequence 0 is empty \(cu_seqlens goes from 0 to 0\); leave it out",
        ),
        (dict(cu_seqlens=torch.tensor([0, 3, 2], dtype=torch.int32)), "sequence 1 is empty"),
        (
            dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
            "from 0 to the number of tokens, 2, not from 0 to 3$",
        ),
        (dict(cu_seqlens=torch.tensor([1, 2], dtype=torch.int32)), "not from 1 to 2$"),
        (dict(sequence_ids=torch.tensor([0, 1])), r"sequence_ids must be an int64 tensor \[1\]"),
    ],
)
def test_errors(backend, checked_values, seed, arguments, sentence):
    call = dict(x=torch.zeros(2, 3), bias=None, residual=torch.zeros(2, 3), p=0.5, seed=seed)
    with pytest.raises(ValueError, match=sentence):
        ops.bias_dropout_add(**call | backend.on_device(arguments))


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    x = torch.ones(2, 8).double()
    sentence = f"'{backend.name}' is forced, but cannot serve bias_dropout_add_fwd: float64"
    with pytest.raises(RuntimeError, match=sentence):
        ops.bias_dropout_add(x, None, x, 0.0, None)
