"""The CUDA kernels of linear_cross_entropy on the CPU, under the sanitizers: every dtype, aligned
and unaligned rows, large logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.cuda_on_host.host import HERE, compile_program, run
from tests.ops.numerics import FORWARD, GRADIENT, HALF_AND_SINGLE, assert_close_to_fp64, same_bits

ROWS = 7


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    return compile_program(HERE / "linear_cross_entropy.cpp", folder, sanitize=True)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def softmax(program, logits, labels, weight, smoothing, gradient, offset=0):
    """The rows' losses and what the kernel leaves in the logits."""
    rows, classes = logits.shape
    numbers = (offset * logits.itemsize, rows, classes, smoothing, int(gradient))
    outputs = [((rows,), torch.float32), (logits.shape, logits.dtype)]
    arguments = ["softmax", name_of(logits.dtype), *numbers]
    return run(program, arguments, [logits, labels, weight], outputs)


def formula(logits, labels, weight, smoothing, precision):
    """The rows' losses, and the gradient of the unweighted ones, computed in `precision`."""
    logits = logits.to(precision).requires_grad_()
    loss = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach() * weight.to(precision), gradient


def inputs(classes, dtype, largest=5.0):
    logits = (torch.rand(ROWS, classes) * 2 - 1) * largest
    labels = torch.randint(classes, (ROWS,))
    labels[:2] = torch.tensor([0, classes - 1])
    return logits.to(dtype), labels, torch.rand(ROWS) + 0.5


def check(program, given, smoothing, offset=0):
    dtype = given[0].dtype
    loss, gradient = softmax(program, *given, smoothing, True, offset)
    exact = formula(*given, smoothing, torch.float64)
    single = formula(*given, smoothing, torch.float32)
    assert_close_to_fp64(loss, exact[0], single[0], FORWARD, "loss")
    assert_close_to_fp64(gradient, exact[1], single[1].to(dtype), GRADIENT, "gradient")
    loss_alone, logits = softmax(program, *given, smoothing, False, offset)
    assert same_bits(loss_alone, loss)
    assert same_bits(logits, given[0])


# One warp and several, rows that begin aligned and, where the number is odd, anywhere.
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 5, 37, 300, 4099])
def test_against_fp64(program, classes, smoothing, dtype):
    check(program, inputs(classes, dtype), smoothing)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("classes", [2, 37, 304])
def test_unaligned_logits(program, classes, offset, dtype):
    """By so many elements."""
    check(program, inputs(classes, dtype), 0.1, offset)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [37, 4099])
def test_large_logits(program, classes, smoothing):
    check(program, inputs(classes, torch.float32, largest=1e4), smoothing)


@pytest.mark.parametrize("falling", [False, True])
def test_logits_that_grow_or_fall(program, falling):
    """Every one of a thread's vectors has a larger maximum than the one before, or none has."""
    logits = torch.linspace(-80, 80, 5000).repeat(ROWS, 1)
    _, *others = inputs(5000, torch.float32)
    check(program, (logits.flip(1) if falling else logits, *others), 0.0)


def test_same_bits_every_time(program):
    given = inputs(300, torch.float16)
    first, second = (softmax(program, *given, 0.1, True) for _ in range(2))
    assert all(map(same_bits, first, second))


def test_no_rows(program):
    logits, labels, weight = (x[:0] for x in inputs(37, torch.float32))
    loss, gradient = softmax(program, logits, labels, weight, 0.0, True)
    assert (loss.numel(), gradient.shape) == (0, (0, 37))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 4096, 4099])
def test_backward(program, elements, offset, dtype):
    """One product, rounded once."""
    dloss, dhidden = torch.tensor([1024.5]), torch.randn(elements)
    arguments = ["scale", name_of(dtype), offset * dtype.itemsize, elements]
    (result,) = run(program, arguments, [dloss, dhidden], [((elements,), dtype)])
    assert same_bits(result, (dhidden * dloss).to(dtype))
