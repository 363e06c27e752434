"""The Triton bias_dropout_add: against float64, its mask bit for bit, and what only a kernel can
get wrong."""

import math
from unittest import mock

import pytest
import torch

from glmkern import ops
from glmkern.ops.philox import keep_mask
from glmkern.triton_kernels import bias_dropout as kernels
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

# rows of less than a tile and of several tiles; of a multiple of four elements and not
SHAPES = [(5,), (3, 17), (63, 64), (2, 5, 100), (3, 1371), (2, 4096)]
LENGTHS = [3, 1, 9, 4]


@pytest.fixture
def seed(device):
    return torch.tensor([-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1], device=device)


def sequences(lengths, device):
    """cu_seqlens, and ids that need all their bits."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    ids = torch.randint(2**31, 2**32, (len(lengths),))
    return ends, ids.to(device)


def expected_mask(seed, lengths, ids, hidden, p):
    return torch.cat(
        [
            keep_mask(seed, ids[b : b + 1], n * hidden, p).view(n, hidden)
            for b, n in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("p", "with_bias"), [(0.0, True), (0.3, True), (0.3, False)])
def test_against_fp64(shape, dtype, with_bias, p, seed, device):
    keep = keep_mask(seed, torch.tensor([0], device=device), math.prod(shape), p).view(shape)

    def inputs():
        x, residual = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2))
        bias = torch.randn(shape[-1]).to(device, dtype).requires_grad_() if with_bias else None
        return x, bias, residual

    def formula(x, bias, residual):
        y = x if bias is None else x + bias
        return (y * keep / (1 - p) if p else y) + residual

    matches_fp64(lambda x, b, r: ops.bias_dropout_add(x, b, r, p, seed), formula, inputs)


@pytest.mark.parametrize("hidden", [1, 2, 3, 4, 36, 57, 1031, 1028])
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.7, 1 - 1e-12])
def test_the_mask_is_the_contract_s(hidden, p, seed, device):
    """Rows that start amid a counter, tiles with rows of several sequences."""
    cu_seqlens, ids = sequences(LENGTHS, device)
    ones = torch.ones(sum(LENGTHS), hidden, device=device)
    keep = expected_mask(seed, LENGTHS, ids, hidden, p).float() / (1 - p)
    with poisoned_memory():
        y = kernels.bias_dropout_add_fwd(ones, None, 0 * ones, p, seed, cu_seqlens, ids)
        dx, _ = kernels.bias_dropout_add_bwd(ones, p, seed, cu_seqlens, ids, True)
    torch.testing.assert_close(y, keep, rtol=2e-7, atol=0)
    assert torch.equal(y != 0, keep != 0)
    assert same_bits(dx, y)


@pytest.mark.parametrize("count", [2, 5, 8, 9])
def test_more_sequences_than_are_compared_at_a_time(count, seed, device, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ENDS", 4)
    lengths = torch.randint(1, 5, (count,)).tolist()
    cu_seqlens, ids = sequences(lengths, device)
    ones = torch.ones(sum(lengths), 12, device=device)
    dx, _ = kernels.bias_dropout_add_bwd(ones, 0.5, seed, cu_seqlens, ids, False)
    assert torch.equal(dx != 0, expected_mask(seed, lengths, ids, 12, 0.5))


def test_packing_does_not_change_a_mask(seed, device):
    x = torch.randn(11, 20, device=device)
    cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32, device=device)
    ids = torch.tensor([5, 0, 2], device=device)
    packed = ops.bias_dropout_add(x, None, x, 0.4, seed, cu_seqlens=cu_seqlens, sequence_ids=ids)
    for b, (start, end) in enumerate([(0, 4), (4, 5), (5, 11)]):
        alone = ops.bias_dropout_add(
            x[start:end], None, x[start:end], 0.4, seed, sequence_ids=ids[b : b + 1]
        )
        assert same_bits(packed[start:end], alone)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(71, 17), (71, 20), (9, 1028)], ids=str)
def test_partials_of_many_rows(shape, dtype, seed, device, monkeypatch):
    """A program that sums the bias gradient of several tiles, the last program of fewer."""
    monkeypatch.setattr(kernels, "MAX_PARTIALS", 4)
    keep = keep_mask(seed, torch.tensor([0], device=device), math.prod(shape), 0.3).view(shape)
    residual = torch.randn(shape).to(device, dtype)

    def formula(x, bias):
        return (x + bias) * keep / (1 - 0.3) + residual

    matches_fp64(
        lambda x, b: ops.bias_dropout_add(x, b, residual, 0.3, seed),
        formula,
        lambda: [torch.randn(s).to(device, dtype).requires_grad_() for s in (shape, shape[1:])],
    )


def test_frozen_bias(seed, device):
    """Without a bias gradient there is none, and dx is the same."""
    dy = torch.randn(37, 100, device=device)
    drop = (dy, 0.3, seed, *sequences([30, 7], device))
    with poisoned_memory():
        dx, dbias = kernels.bias_dropout_add_bwd(*drop, False)
        dx_too, _ = kernels.bias_dropout_add_bwd(*drop, True)
    assert dbias.shape == (0,)
    assert same_bits(dx, dx_too)


def test_same_bits_every_time(seed, device):
    x, residual = torch.randn(40, 1030, device=device), torch.randn(40, 1030, device=device)
    drop = (0.3, seed, *sequences([33, 7], device))
    with poisoned_memory():
        first, second = (
            (
                kernels.bias_dropout_add_fwd(x, x[0], residual, *drop),
                *kernels.bias_dropout_add_bwd(x, *drop, True),
            )
            for _ in range(2)
        )
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (9, 17), (3, 1100)], ids=str)
def test_touches_nothing_outside(shape, p, seed, device, monkeypatch):
    """Inputs lie between NaNs, outputs between guards: no NaN comes in, no guard changes."""
    M, H = shape
    margin, buffers = 8 * H + 2048, []

    def surrounded(fill):
        buffers.append(torch.full((2 * margin + M * H,), fill, device=device))
        return buffers[-1][margin:-margin].view(M, H)

    x, residual, dy, bias = (surrounded(torch.nan).copy_(torch.randn(shape)) for _ in range(4))
    cu_seqlens, ids = sequences([M], device)
    monkeypatch.setattr(torch, "empty_like", lambda like: surrounded(7.0))
    outputs = [kernels.bias_dropout_add_fwd(x, bias[0], residual, p, seed, cu_seqlens, ids)]
    if p > 0:
        outputs += kernels.bias_dropout_add_bwd(dy, p, seed, cu_seqlens, ids, True)
    assert all(t.isfinite().all() for t in outputs)
    assert len(buffers) > 4
    for buffer in buffers[4:]:
        assert (buffer[:margin] == 7.0).all()
        assert (buffer[-margin:] == 7.0).all()


def test_no_rows(seed, device):
    x = torch.randn(2, 0, 6, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, requires_grad=True)
    y = ops.bias_dropout_add(x, bias, x.detach(), 0.0, None)
    assert y.shape == (2, 0, 6)
    assert same_bits(torch.autograd.grad(y.sum(), bias)[0], torch.zeros(6, device=device))


def test_inputs_with_strides(seed, device):
    x, residual, bias = (torch.randn(s, device=device) for s in ((10, 6), (10, 6), 20))
    seeds = torch.stack([seed, seed + 1], 1)
    expected = ops.bias_dropout_add(
        x.t().contiguous(), bias[::2].contiguous(), residual.t().contiguous(), 0.3, seed
    )
    result = ops.bias_dropout_add(x.t(), bias[::2], residual.t(), 0.3, seeds[:, 0])
    assert same_bits(result, expected)


def test_sequences_are_checked_where_reading_them_is_free(seed, device, monkeypatch):
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    x = torch.zeros(2, 3, device=device)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="from 0 to the number of tokens, 2, not from 0 to 3$"):
        ops.bias_dropout_add(x, None, x, 0.5, seed, cu_seqlens=cu_seqlens)


def test_forced_backend_runs_the_kernels(seed, device):
    x = torch.ones(2, 8, device=device, requires_grad=True)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.bias_dropout_add(x, None, x.detach(), 0.5, seed).sum().backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.bias_dropout_add_fwd_kernel,
        kernels.bias_dropout_add_bwd_kernel,
    ]


def test_forced_backend_refuses_float64(device):
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve bias_dropout"):
        ops.bias_dropout_add(x, None, x, 0.0, None)
