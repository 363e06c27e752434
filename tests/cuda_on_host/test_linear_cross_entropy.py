"""The CUDA kernels of linear_cross_entropy on the CPU, under the sanitizers: every dtype, aligned
and unaligned rows, large logits. And the whole op where it takes several chunks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from glmkern.ops.quant_linear import as_stored
from tests.cuda_on_host.host import HERE, compile_program, run
from tests.cuda_on_host.sanitized import load_kernels
from tests.ops.numerics import (
    FORWARD,
    GRADIENT,
    HALF_AND_SINGLE,
    assert_close_to_fp64,
    poisoned_memory,
    same_bits,
)

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
@pytest.mark.parametrize("width", [5, 16, 1032])
def test_scatter(program, width, offset, dtype):
    """One product, of the rows that are named alone."""
    gradient, weight, rows = torch.randn(3, width).to(dtype), torch.rand(3), torch.tensor([1, 4, 5])
    arguments = ["scatter", name_of(dtype), offset * dtype.itemsize, 3, width, 7]
    (result,) = run(program, arguments, [gradient, weight, rows], [((7, width), torch.float32)])
    assert same_bits(result[rows], gradient.float() * weight.unsqueeze(1))
    assert result[[0, 2, 3, 6]].isnan().all()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 4096, 4099])
def test_backward(program, elements, offset, dtype):
    """One product, rounded once."""
    dloss, dhidden = torch.tensor([1024.5]), torch.randn(elements)
    arguments = ["scale", name_of(dtype), offset * dtype.itemsize, elements]
    (result,) = run(program, arguments, [dloss, dhidden], [((elements,), dtype)])
    assert same_bits(result, (dhidden * dloss).to(dtype))


def whole(hidden, weight, labels, ignore_index):
    """Loss and gradient by the op itself, twice to the same bits."""
    stored, kernel = as_stored(weight), load_kernels().linear_cross_entropy_fwd
    with poisoned_memory():
        first, second = (
            kernel(hidden, *stored, labels, None, ignore_index, 0.0, True) for _ in range(2)
        )
    assert all(map(same_bits, first, second))
    return first


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_several_chunks(ignore_index):
    """Of at most 512 rows: 515 or 520 make two, about equal."""
    classes = 8200
    hidden, weight = torch.randn(520, 2), torch.randn(classes, 2)
    labels = torch.randint(classes, (520,))
    if ignore_index is not None:
        labels[::104] = ignore_index
    losses = []
    for dtype in (torch.float64, torch.float32):
        x = hidden.to(dtype).requires_grad_()
        loss = cross_entropy(x @ weight.to(dtype).T, labels)
        losses.append((loss.detach(), *torch.autograd.grad(loss, x)))
    loss, gradient = whole(hidden, weight, labels, ignore_index)
    (exact, exact_gradient), (single, single_gradient) = losses
    assert_close_to_fp64(loss, exact, single, FORWARD, "loss")
    assert_close_to_fp64(gradient, exact_gradient, single_gradient, GRADIENT, "gradient")


@pytest.mark.parametrize(("ignore_index", "counted"), [(-100, True), (None, False)])
def test_the_host_counts_rows_only_where_some_may_be_ignored(ignore_index, counted):
    hidden, weight, labels = torch.randn(5, 4), torch.randn(9, 4), torch.randint(9, (5,))
    with torch.profiler.profile() as profile:
        whole(hidden, weight, labels, ignore_index)
    assert ("aten::nonzero" in {event.name for event in profile.events()}) == counted


def test_no_labelled_row():
    loss, gradient = whole(torch.randn(3, 4), torch.randn(9, 4), torch.full((3,), -100), -100)
    assert loss == 0 and gradient.equal(torch.zeros(3, 4))
