"""swiglu, reference and C++: numbers, registration, determinism, errors."""

import pytest
import torch
import torch.nn.functional as F

import glmkern
from glmkern import ops
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

OP = "swiglu_fwd"


def formula(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 34), (2, 3, 200), (63, 1370)], ids=str)
def test_against_fp64(backend, shape, dtype):
    matches_fp64(ops.swiglu, formula, lambda: [(3 * torch.randn(shape)).to(dtype).requires_grad_()])


def test_gates_far_from_zero(backend):
    """exp's range ends at 88: sigmoid is 0, as far as float32 shows it, or 1 there."""
    gate = torch.tensor([-1e4, -200.0, -89.0, -87.5, -80.0, -20.0, -0.0, 0.0, 20.0, 80.0, 200.0])
    x = torch.cat([gate, torch.ones(len(gate))]).requires_grad_()
    matches_fp64(ops.swiglu, formula, [x])
    assert ops.swiglu(x)[-1] == 200


def test_no_elements(backend):
    for shape in ((0, 6), (3, 0)):
        x = torch.randn(shape, requires_grad=True)
        y = ops.swiglu(x)
        assert y.shape == (shape[0], shape[1] // 2)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_inputs_with_strides(backend):
    x = torch.randn(6, 10).t()
    assert same_bits(ops.swiglu(x), ops.swiglu(x.contiguous()))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(700, 130), (1, 54784), (63, 4099 * 2)], ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(threads, shape, dtype):
    """Threads may meet amid a row: one row is shared too."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape[0], shape[1] // 2).to(dtype)

    def run(count):
        threads(count)
        with poisoned_memory(), glmkern.backend("cpu"):
            y = ops.swiglu(x)
            return y, torch.autograd.grad(y, x, upstream)[0]

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.tensor(1.0)])
def test_odd_width(x):
    with pytest.raises(ValueError, match="gate and up, two halves of one size"):
        ops.swiglu(x)


def test_wrong_dtype():
    with pytest.raises(ValueError, match="x must be float32, float16, bfloat16 or float64"):
        ops.swiglu(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("dy", "x", "sentence"),
    [
        (torch.zeros(2, 4), torch.zeros(3, 8), "dy must have 12 elements, not 8"),
        (torch.zeros(3, 4).half(), torch.zeros(3, 8), "dy has another dtype"),
        (torch.zeros(3, 4), torch.zeros(8, 3).t(), "x is not contiguous"),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 7),
            "x's last dimension must hold two halves of one size",
        ),
    ],
)
def test_the_kernels_guard_direct_calls(dy, x, sentence):
    glmkern.backends("cpu")
    with pytest.raises(RuntimeError, match=f"^swiglu_bwd: {sentence}$"):
        torch.ops.glmkern_cpu.swiglu_bwd(dy, x)
