"""The dropout contract of glmkern/ops/philox.py for Triton kernels.

A kernel takes `seed`, int64 [2] on its device, and `threshold` as it comes from `drop_constants`;
list `threshold` under do_not_specialize. Element i of a sequence is lane i % 4 of group i // 4.
"""

import ctypes

import triton
import triton.language as tl


def drop_constants(p: float) -> tuple[int, float]:
    """The threshold, as a kernel takes it, and the factor of a kept element, 1 / (1 - p).

    The threshold is unsigned, but Triton passes integers from 2^31 on as int64: it is handed over
    as the int32 of the same bits.
    """
    threshold = round(p * 2**32)
    if threshold == 2**32:  # not even the largest number is kept
        return -1, 0.0
    return ctypes.c_int32(threshold).value, 1 / ctypes.c_float(1 - p).value


@triton.jit
def draw(seed, sequence_id, o_g):
    """The four lanes, uint32, of the groups o_g of a sequence: a tuple of four blocks.

    sequence_id is a number or a block of integers that broadcasts against o_g.
    """
    key = tl.load(seed)
    offset = tl.load(seed + 1)
    return tl.philox(
        key,
        o_g.to(tl.uint32),
        sequence_id.to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
    )


@triton.jit
def keep(seed, sequence_id, o_i, threshold):
    """Whether elements o_i of a sequence, of any shape and order, are kept.

    Each element draws its whole group: four times the work of `keep_groups`.
    """
    b_0, b_1, b_2, b_3 = draw(seed, sequence_id, o_i >> 2)
    lane = o_i & 3
    b_low = tl.where(lane == 0, b_0, b_1)
    b_high = tl.where(lane == 2, b_2, b_3)
    return tl.where(lane < 2, b_low, b_high) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def keep_groups(seed, sequence_id, o_g, threshold):
    """Whether the elements of the groups o_g [..., N] of a sequence are kept, [..., 4 N]."""
    b_0, b_1, b_2, b_3 = draw(seed, sequence_id, o_g)
    limit = threshold.to(tl.uint32, bitcast=True)
    # [..., 2 N]
    m_even = tl.interleave(b_0 >= limit, b_2 >= limit)
    m_odd = tl.interleave(b_1 >= limit, b_3 >= limit)
    # [..., 4 N]
    return tl.interleave(m_even, m_odd)
