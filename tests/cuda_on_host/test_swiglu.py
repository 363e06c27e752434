"""The CUDA kernels of swiglu on the CPU, beyond the tests that all backends share: 16-byte accesses
and single elements, one tensor unaligned at a time, no rows."""

import pytest
import torch

from tests.cuda_on_host.sanitized import unaligned
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits

# rows, width: vectors and single elements, blocks of several rows and rows of several blocks
SHAPES = [(1, 1), (5, 17), (9, 64), (3, 1032), (2, 1100), (1, 13696)]


def inputs(rows, width, dtype):
    """dy and x."""
    return torch.randn(rows, width).to(dtype), (3 * torch.randn(rows, 2 * width)).to(dtype)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(9, 64), (3, 1032)], ids=str)
def test_single_elements_have_the_bits_of_vectors(kernels, shape, dtype):
    dy, x = inputs(*shape, dtype)
    with poisoned_memory():
        y, dx = kernels.swiglu_fwd(x), kernels.swiglu_bwd(dy, x)
        assert same_bits(kernels.swiglu_fwd(unaligned(x)), y)
        assert same_bits(kernels.swiglu_bwd(unaligned(dy), x), dx)
        assert same_bits(kernels.swiglu_bwd(dy, unaligned(x)), dx)


def test_no_rows(kernels):
    dy, x = inputs(0, 64, torch.float32)
    assert kernels.swiglu_fwd(x).shape == (0, 64)
    assert kernels.swiglu_bwd(dy, x).shape == (0, 128)
