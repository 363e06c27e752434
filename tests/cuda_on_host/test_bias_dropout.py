"""The CUDA kernels of bias_dropout_add on the CPU, beyond the tests that all backends share: single
elements, one tensor unaligned at a time, splits of every kind, many sequences."""

import pytest
import torch

from tests.cuda_on_host.sanitized import unaligned
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits
from tests.ops.test_bias_dropout import SEED, expected_mask, sequences

# rows, hidden: vectors and single elements, a tile with lanes to spare and several tiles
SHAPES = [(1, 1), (9, 17), (17, 64), (3, 1032), (33, 300)]
seed = torch.tensor(SEED)


def inputs(rows, hidden, dtype):
    """x, a bias, a residual and dy."""
    x, residual, dy = torch.randn(3, rows, hidden).to(dtype)
    return x, torch.randn(hidden).to(dtype), residual, dy


def arguments_of_dropout(p, lengths):
    return (p, seed, *sequences(lengths)) if p > 0 else (p, None, None, None)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(17, 64), (3, 1032)], ids=str)
def test_single_elements_have_the_bits_of_vectors(kernels, shape, p, dtype):
    x, bias, residual, dy = inputs(*shape, dtype)
    drop = arguments_of_dropout(p, [shape[0] - 2, 2])
    with poisoned_memory():
        y = kernels.bias_dropout_add_fwd(x, bias, residual, *drop)
        for i in range(3):
            tensors = [unaligned(t) if i == j else t for j, t in enumerate((x, bias, residual))]
            assert same_bits(kernels.bias_dropout_add_fwd(*tensors, *drop), y)
        if p > 0:
            results = kernels.bias_dropout_add_bwd(dy, *drop, True)
            others = kernels.bias_dropout_add_bwd(unaligned(dy), *drop, True)
            assert all(map(same_bits, results, others))


@pytest.mark.parametrize("hidden", [6, 64])
def test_a_frozen_bias_changes_nothing_else(kernels, hidden):
    drop = arguments_of_dropout(0.3, [30, 7])
    dy = torch.randn(37, hidden).half()
    with poisoned_memory():
        dx, dbias = kernels.bias_dropout_add_bwd(dy, *drop, False)
        assert same_bits(dx, kernels.bias_dropout_add_bwd(dy, *drop, True)[0])
    assert dbias.shape == (0,)


@pytest.mark.parametrize("hidden", [3, 8])
@pytest.mark.parametrize("lengths", [[1] * 40, [2, 30, 1, 1, 19, 5]], ids=str)
def test_many_sequences(kernels, lengths, hidden):
    """A warp passes several sequences from one of its rows to the next."""
    cu_seqlens, ids = sequences(lengths)
    ones = torch.ones(sum(lengths), hidden)
    with poisoned_memory():
        drop = (0.5, seed, cu_seqlens, ids)
        y = kernels.bias_dropout_add_fwd(ones, None, 0 * ones, *drop)
        dx, _ = kernels.bias_dropout_add_bwd(ones, *drop, True)
    assert torch.equal(y != 0, expected_mask(seed, lengths, ids, hidden, 0.5))
    assert same_bits(dx, y)


@pytest.mark.parametrize("hidden", [3, 4])
@pytest.mark.parametrize("rows", [16, 17, 1100, 2068])
def test_sums_over_splits(kernels, rows, hidden):
    """One split, two of unequal lengths, 64 of 18 rows that leave the last two empty, and 65."""
    drop = arguments_of_dropout(0.3, [rows])
    dy = torch.randn(rows, hidden)
    with poisoned_memory():
        dx, dbias = kernels.bias_dropout_add_bwd(dy, *drop, True)
    exact = dx.double().sum(0)
    torch.testing.assert_close(dbias.double(), exact, rtol=0, atol=1e-6 * dx.abs().sum(0).max())


def test_no_rows(kernels):
    x = torch.empty(0, 64)
    drop = (0.5, seed, torch.zeros(2, dtype=torch.int32), torch.tensor([0]))
    with poisoned_memory():
        assert kernels.bias_dropout_add_fwd(x, None, x, *drop).shape == (0, 64)
        dx, dbias = kernels.bias_dropout_add_bwd(x, *drop, True)
    assert dx.shape == (0, 64) and same_bits(dbias, torch.zeros(64))


def test_no_sequence(kernels):
    drop = (0.5, seed, torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="^bias_dropout_add_bwd: dropout needs at least one seq"):
        kernels.bias_dropout_add_bwd(torch.ones(2, 4), *drop, True)
