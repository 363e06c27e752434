"""What only a C++ kernel of quant_linear can get wrong: bits, rows, direct calls."""

import pytest
import torch

from glmkern import ops
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits

OP = "quant_linear_fwd"
FLOATING = {16: torch.float16, 32: torch.float32}  # a dense weight's dtype by its bits


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("k", [260, 6402])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, dtype, bits, k):
    weight = torch.randn(301, k)
    packed, scale, bits = (
        ops.quantize(weight, bits) if bits <= 8 else (weight.to(FLOATING[bits]), None, bits)
    )
    tensors = {
        m: (torch.randn(m, k).to(dtype), torch.randn(m, 301).to(dtype)) for m in (1, 3, 15, 300)
    }

    def run(count):
        threads(count)
        with poisoned_memory():
            return [
                y
                for x, dy in tensors.values()
                for y in (
                    torch.ops.glmkern.quant_linear_fwd(x, packed, scale, bits, None),
                    torch.ops.glmkern.quant_linear_bwd(dy, packed, scale, bits),
                )
            ]

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("cpu")
def test_rows_do_not_depend_on_each_other(backend):
    """A row's result has the same bits in a batch of 300 as in one of 20, and backward alone."""
    qweight = ops.quantize(torch.randn(150, 200))
    x, dy = torch.randn(300, 200), torch.randn(300, 150)
    y = torch.ops.glmkern.quant_linear_fwd(x, *qweight, None)
    assert same_bits(y[80:100], torch.ops.glmkern.quant_linear_fwd(x[80:100], *qweight, None))
    dx = torch.ops.glmkern.quant_linear_bwd(dy, *qweight)
    assert same_bits(dx[7:8], torch.ops.glmkern.quant_linear_bwd(dy[7:8], *qweight))


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize(
    ("position", "wrong", "sentence"),
    [
        (0, torch.zeros(2, 7), "x's last dimension must be 8"),
        (1, torch.zeros(8, 5, dtype=torch.int8).t(), "the packed weight is not contiguous"),
        (1, torch.zeros(5, 8, dtype=torch.int32), "serves weights of int8 codes"),
        (2, torch.zeros(4), "scale must have 5 elements, not 4"),
        (2, None, "codes need their scale"),
        (4, torch.zeros(4), "bias must have 5 elements, not 4"),
    ],
)
def test_the_kernels_guard_direct_calls(backend, position, wrong, sentence):
    call = [torch.zeros(2, 8), torch.zeros(5, 8, dtype=torch.int8), torch.zeros(5), 8, None]
    call[position] = None if wrong is None else wrong.to(backend.device)
    with pytest.raises(
        RuntimeError, match=f"^quant_linear_fwd.* {sentence}|^quant_linear_fwd {sentence}"
    ):
        backend.kernels.quant_linear_fwd(*call)
