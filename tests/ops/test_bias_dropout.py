"""bias_dropout_add against float64, its mask, its registration and its errors."""

import math

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, same_bits

SEED = torch.tensor([0x1234_5678_9ABC, 77])
SHAPES = [(5,), (1, 1), (3, 17), (63, 64), (2, 5, 100), (7, 4099)]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_against_fp64(shape, dtype, with_bias, p):
    keep = keep_mask(SEED, torch.tensor([0]), math.prod(shape), p).view(shape)

    def inputs():
        x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(shape[-1]).to(dtype).requires_grad_() if with_bias else None
        return x, bias, residual

    def formula(x, bias, residual):
        y = x if bias is None else x + bias
        return (y * keep / (1 - p) if p else y) + residual

    matches_fp64(lambda x, b, r: ops.bias_dropout_add(x, b, r, p, SEED), formula,
                 inputs)


def test_packing_does_not_change_a_mask():
    rows = [torch.randn(n, 9) for n in (4, 1, 6)]
    alone = [ops.bias_dropout_add(x, None, torch.zeros_like(x), 0.4, SEED,
                                  cu_seqlens=torch.tensor([0, len(x)], dtype=torch.int32),
                                  sequence_ids=torch.tensor([i])) for i, x in enumerate(rows)]
    order = [2, 0, 1]
    packed = torch.cat([rows[i] for i in order])
    cu_seqlens = torch.tensor([0, 6, 10, 11], dtype=torch.int32)
    together = ops.bias_dropout_add(packed, None, torch.zeros_like(packed), 0.4, SEED,
                                    cu_seqlens=cu_seqlens, sequence_ids=torch.tensor(order))
    assert same_bits(together, torch.cat([alone[i] for i in order]))


def test_backward_draws_the_forward_mask():
    x = torch.ones(50, 33, requires_grad=True)
    y = ops.bias_dropout_add(x, None, torch.zeros_like(x), 0.5, SEED)
    y.sum().backward()
    assert same_bits(x.grad, y.detach())


def test_evaluation_drops_nothing():
    x = torch.randn(3, 5)
    assert same_bits(ops.bias_dropout_add(x, None, x, 0.9, None, training=False), x + x)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_registration(p):
    x, bias, residual = (torch.randn(s, requires_grad=True) for s in ((4, 6), (6,), (4, 6)))
    sequences = (torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0]))
    check_registration(torch.ops.glmkern.bias_dropout_add_fwd.default,
                       (x, bias, residual, p, SEED, *sequences))
    check_registration(torch.ops.glmkern.bias_dropout_add_bwd.default,
                       (x.detach(), 0.5, SEED, *sequences, True))
    check_compiles(lambda x, b, r: ops.bias_dropout_add(x, b, r, p, SEED),
                   [[torch.randn(n, 6, requires_grad=True), bias,
                     torch.randn(n, 6, requires_grad=True)] for n in (4, 7)])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(residual=torch.zeros(2, 4)), "residual must have x's shape"),
    (dict(x=torch.zeros(3, 0), residual=torch.zeros(3, 0)), "a last dimension that is not empty"),
    (dict(bias=torch.zeros(2)), r"bias must have shape \[3\]"),
    (dict(bias=torch.zeros(3, dtype=torch.float64)), "bias is float64 but x is float32"),
    (dict(p=1.0), r"must be in \[0, 1\), not 1.0"),
    (dict(seed=None), "dropout needs seed"),
    (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens must be an int32 tensor"),
    (dict(cu_seqlens=torch.tensor([0, 0, 2], dtype=torch.int32)), "sequence 0 is empty"),
    (dict(cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), "from 0 to the number of tokens, 2"),
    (dict(sequence_ids=torch.tensor([0, 1])), r"sequence_ids must be an int64 tensor \[1\]"),
])
def test_errors(arguments, sentence):
    call = dict(x=torch.zeros(2, 3), bias=None, residual=torch.zeros(2, 3), p=0.5, seed=SEED)
    with pytest.raises(ValueError, match=sentence):
        ops.bias_dropout_add(**{**call, **arguments})
