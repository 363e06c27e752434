"""The dropout contract's helpers for kernels, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from glmkern.ops.philox import keep_mask, philox4x32
from glmkern.triton_kernels import philox

SEED = [-0x1234_5678_9ABC_DEF0, 2**62 + 2**33 + 1]


@triton.jit
def draw_kernel(seed, sequence_ids, o_groups, words, BS: tl.constexpr, BG: tl.constexpr):
    """words [BS, BG, 4] of sequences [BS] and groups [BG]."""
    o_s, o_g = tl.arange(0, BS), tl.arange(0, BG)
    # [BS, BG]
    b_words = philox.draw(
        seed, tl.load(sequence_ids + o_s)[:, None], tl.load(o_groups + o_g)[None, :]
    )
    p_words = words + (o_s[:, None] * BG + o_g[None, :]) * 4
    for lane in tl.static_range(4):
        tl.store(p_words + lane, b_words[lane].to(tl.int64))


@triton.jit(do_not_specialize=["threshold"])
def keep_kernel(seed, sequence_ids, threshold, each, grouped, BS: tl.constexpr, BN: tl.constexpr):
    """Masks [BS, BN] of the first elements of sequences [BS], by both helpers."""
    o_s, o_i = tl.arange(0, BS), tl.arange(0, BN)
    b_id = tl.load(sequence_ids + o_s)[:, None]
    o_mask = o_s[:, None] * BN + o_i[None, :]
    tl.store(each + o_mask, philox.keep(seed, b_id, o_i[None, :].to(tl.int64), threshold))
    o_g = tl.arange(0, BN // 4)[None, :]
    tl.store(grouped + o_mask, philox.keep_groups(seed, b_id, o_g, threshold))


@triton.jit(do_not_specialize=["threshold"])
def keep_of_one_kernel(seed, sequence_ids, threshold, mask, BN: tl.constexpr):
    """The last elements first, of one sequence, its id a number."""
    o_i = BN - 1 - tl.arange(0, BN)
    tl.store(mask + o_i, philox.keep(seed, tl.load(sequence_ids), o_i, threshold))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("seed", [(0, 0), (-1, -1), tuple(SEED), (2**31, -(2**31))], ids=str)
def test_numbers(backend, seed):
    """Keys, offsets, ids and counters that need all their bits; counters beyond 32 wrap."""
    seed = torch.tensor(seed)
    ids = torch.tensor([0, 7, 2**31 + 5, 2**32 - 1])
    groups = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**34 + 3, 5])
    words = torch.full((4, 8, 4), -1)
    draw_kernel[(1,)](seed, ids, groups, words, BS=4, BG=8)
    assert torch.equal(words, philox4x32(seed, groups, ids.unsqueeze(1)))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("p", [1e-12, 2**-32, 0.1, 0.5, 0.7, 1 - 2**-32, 1 - 1e-12])
def test_masks(backend, p):
    """Thresholds of 0, of 1, on either side of 2^31, and those that nothing passes."""
    seed = torch.tensor(SEED)
    ids = torch.tensor([3, 2**32 - 1])
    each, grouped = (torch.zeros(2, 64, dtype=torch.bool) for _ in range(2))
    threshold, factor = philox.drop_constants(p)
    keep_kernel[(1,)](seed, ids, threshold, each, grouped, BS=2, BN=64)
    expected = keep_mask(seed, ids, 64, p)
    assert torch.equal(each, expected)
    assert torch.equal(grouped, expected)
    one = torch.zeros(64, dtype=torch.bool)
    keep_of_one_kernel[(1,)](seed, ids, threshold, one, BN=64)
    assert torch.equal(one, expected[0])
    assert factor > 0 or not expected.any()


@pytest.mark.parametrize("p", [0.1, 0.25, 1 / 3, 0.999])
def test_factor_is_rounded_as_float32_division(p):
    factor = torch.tensor(philox.drop_constants(p)[1], dtype=torch.float32)
    assert factor == torch.ones(()) / (1 - p)
