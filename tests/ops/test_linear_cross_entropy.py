"""linear_cross_entropy: numbers, chunks, layouts, errors."""

import sys

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import linear_cross_entropy as kernels
from tests.backends import slow, very_slow
from tests.ops.formulas import linear_cross_entropy
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits

# The package's attribute of that name is the function.
module = sys.modules["glmkern.ops.linear_cross_entropy"]
OP = "linear_cross_entropy_fwd"
library = torch.ops.glmkern
# tokens, width, classes, whether with token_weight; 33 classes are two blocks of 32. The loss is
# one number a draw, so that there are many draws, and an interpreter needs milliseconds a row.
CASES = [(1, 1, 2, False), (4, 3, 7, True), (5, 20, 33, False)]
CASES += [
    mark(*shape, weighted)
    for mark, shape in [
        (slow, (1, 1, 2)),
        (slow, (5, 3, 7)),
        (slow, (17, 64, 100)),
        (slow, (63, 33, 257)),
        (very_slow, (700, 20, 150)),
    ]
    for weighted in (False, True)
    if (*shape, weighted) != (1, 1, 2, False)
]


def labelled(tokens, classes):
    labels = torch.randint(classes, (tokens,))
    labels[torch.rand(tokens) < 0.4] = -100
    labels[-1] = classes - 1
    return labels


@pytest.fixture
def small_chunks(monkeypatch):
    """small_chunks(elements) makes several chunks, the last one ragged, and blocks of classes."""

    def shrink(elements):
        for implementation in (module, kernels):
            monkeypatch.setattr(implementation, "CHUNK_ELEMENTS", elements)
            monkeypatch.setattr(implementation, "LEAST_CHUNK_ROWS", 1)
        monkeypatch.setattr(kernels, "MAX_COLUMNS", 32)

    return shrink


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        *((dtype, dtype) for dtype in HALF_AND_SINGLE),
        slow(torch.float32, torch.float16),
        slow(torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "width", "classes", "weighted"), CASES)
def test_against_fp64(backend, tokens, width, classes, weighted, dtype, stored, small_chunks):
    small_chunks((3 if tokens < 8 else 8) * classes)
    weight, labels = torch.randn(classes, width).to(stored), labelled(tokens, classes)
    token_weight = torch.rand(tokens) if weighted else None

    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels, token_weight=token_weight),
        lambda h: linear_cross_entropy(h, weight, labels, token_weight),
        lambda: [torch.randn(tokens, width).to(dtype).requires_grad_()],
    )


@pytest.mark.slow_when_interpreted
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("tokens", "width", "classes"), [(1, 2, 2), (17, 34, 101), (131, 64, 33)])
def test_quantised_weight(backend, tokens, width, classes, dtype, bits):
    weight, labels = (
        ops.quantize(torch.randn(classes, width).half(), bits),
        labelled(tokens, classes),
    )
    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels),
        lambda h: linear_cross_entropy(h, weight, labels, None),
        lambda: [torch.randn(tokens, width).to(dtype).requires_grad_()],
    )


@pytest.mark.slow_when_interpreted
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "width", "classes"), [(5, 3, 7), (63, 33, 257)])
def test_label_smoothing(backend, tokens, width, classes, weighted, dtype, smoothing):
    weight, labels = torch.randn(classes, width).to(dtype), labelled(tokens, classes)
    token_weight = torch.rand(tokens) if weighted else None
    matches_fp64(
        lambda h: ops.linear_cross_entropy(
            h, weight, labels, token_weight=token_weight, label_smoothing=smoothing
        ),
        lambda h: linear_cross_entropy(h, weight, labels, token_weight, smoothing),
        lambda: [torch.randn(tokens, width).to(dtype).requires_grad_()],
    )


@pytest.mark.parametrize(("bits", "smoothing"), [(8, 0.0), (4, 0.2), (8, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, slow(torch.bfloat16)], ids=str)
def test_quantised_weight_and_label_smoothing(backend, dtype, bits, smoothing, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_COLUMNS", 16)
    weight, labels = ops.quantize(torch.randn(37, 16).half(), bits), labelled(5, 37)
    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels, label_smoothing=smoothing),
        lambda h: linear_cross_entropy(h, weight, labels, None, smoothing),
        lambda: [torch.randn(5, 16).to(dtype).requires_grad_()],
        sample=30,
    )


def test_only_labelled_rows_matter(backend):
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    labels = torch.tensor([-100, 3, -100, 8, 0, -100])
    expected = ops.linear_cross_entropy(hidden, weight, labels)
    hidden[labels == -100] = float("nan")
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == expected
    assert (hidden.grad[labels == -100] == 0).all()
    row = hidden[:1].detach()
    assert ops.linear_cross_entropy(row, weight, labels[1:2], ignore_index=-1).isnan()


@pytest.mark.parametrize("stored", [None, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_row_is_labelled(backend, weighted, stored):
    """ignore_index None gives the bits of rows that happen to be labelled all."""
    hidden, labels = torch.randn(7, 6, requires_grad=True), torch.randint(9, (7,))
    weight = torch.randn(9, 6)
    weight = ops.quantize(weight, stored) if stored else weight
    options = dict(token_weight=torch.rand(7) if weighted else None, label_smoothing=0.1)
    results = []
    for ignore_index in (-100, None):
        loss = ops.linear_cross_entropy(
            hidden, weight, labels, ignore_index=ignore_index, **options
        )
        results.append([loss, *torch.autograd.grad(loss, hidden)])
    assert all(map(same_bits, *results))


def test_no_rows_to_ignore_and_no_rows(backend, checked_values):
    sentence = "^linear_cross_entropy: no row carries a label, so there is no loss; leave such rows"
    with pytest.raises(ValueError, match=sentence):
        ops.linear_cross_entropy(
            torch.zeros(0, 6), torch.zeros(9, 6), torch.zeros(0).long(), ignore_index=None
        )
    with pytest.raises(ValueError, match="labels run from -100 to -100, but the classes"):
        labels = torch.tensor([-100])
        ops.linear_cross_entropy(torch.zeros(1, 6), torch.zeros(9, 6), labels, ignore_index=None)


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_logits_far_from_and_near_zero(backend, size):
    weight, labels = torch.randn(30, 8) * size, labelled(9, 30)
    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels),
        lambda h: F.cross_entropy(h @ weight.to(h.dtype).T, labels),
        lambda: [torch.randn(9, 8).requires_grad_()],
    )


def test_arguments_of_any_strides(backend):
    hidden, packed, scale = torch.randn(5, 6), *ops.quantize(torch.randn(9, 6), 8)[:2]
    labels, token_weight = torch.randint(9, (5,)), torch.rand(5)
    expected = ops.linear_cross_entropy(
        hidden, ops.QuantizedWeight(packed, scale, 8), labels, token_weight=token_weight
    )

    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    weight = ops.QuantizedWeight(strided(packed), strided(scale), 8)
    assert (
        ops.linear_cross_entropy(
            strided(hidden), weight, strided(labels), token_weight=strided(token_weight)
        )
        == expected
    )


def test_without_gradient(backend):
    hidden, weight, labels = torch.randn(9, 8), torch.randn(30, 8), labelled(9, 30)
    arguments = hidden, weight, None, 32, labels, None, -100, 0.0
    with poisoned_memory():
        loss, dhidden = library.linear_cross_entropy_fwd(*arguments, False)
        loss_too, dhidden_too = library.linear_cross_entropy_fwd(*arguments, True)
    assert dhidden.shape == (0,)
    assert dhidden_too.shape == (9, 8)
    assert same_bits(loss, loss_too)


@pytest.mark.backends("reference")
def test_unlabelled_rows_get_no_logits(backend, monkeypatch):
    formed = []
    matmul = torch.Tensor.__matmul__

    def spy(a, b):
        formed.append(matmul(a, b))
        return formed[-1]

    labels = torch.full((40,), -100)
    labels[[3, 17, 39]] = 5
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    ops.linear_cross_entropy(torch.randn(40, 4), torch.randn(9, 4), labels)
    assert sum(len(x) for x in formed if x.shape[-1] == 9) == 3


def test_a_loss_scale_acts_before_rounding_to_half(backend):
    hidden = torch.randn(8, 16).half().requires_grad_()
    weight, labels = (torch.randn(50, 16) * 1e-3).half(), torch.randint(50, (8,))
    tiny = torch.full((8,), 1e-6)
    loss = ops.linear_cross_entropy(hidden, weight, labels, token_weight=tiny)
    (loss * 2**20).backward()
    assert (hidden.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 20), (3, 1100)], ids=str)
def test_backward_scales(backend, shape, dtype):
    dhidden, dloss = torch.randn(shape), torch.tensor(3.7)
    with poisoned_memory():
        result = library.linear_cross_entropy_bwd(dloss, dhidden, dtype)
    assert same_bits(result, (dhidden * dloss).to(dtype))


@pytest.mark.backends("cpu", "triton", "cuda")
def test_float64_has_no_kernel(backend):
    hidden, weight = torch.ones(2, 8).double(), torch.ones(4, 8).double()
    sentence = f"'{backend.name}' is forced, but cannot serve linear_cross_entropy_fwd: float64"
    with pytest.raises(RuntimeError, match=sentence):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(labels=torch.full((4,), -100)), "no row carries a label"),
        (
            dict(labels=torch.tensor([0, 5, 1, 2])),
            "labels run from 0 to 5, but the classes are 0 to 4",
        ),
        (dict(labels=torch.tensor([0, -1, 1, 2])), "labels run from -1"),
        (
            dict(weight=torch.zeros(7, 3, dtype=torch.float64)),
            "must have hidden's dtype or a narrower",
        ),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels must be int64 \[4\]"),
        (dict(weight=torch.zeros(5, 3, requires_grad=True)), "pass weight.detach"),
        (
            dict(weight=ops.QuantizedWeight(torch.zeros(5, 2, dtype=torch.int8), torch.ones(5), 8)),
            r"weight \[V, H\], not \(4, 3\) and \(5, 2\)",
        ),
        (
            dict(weight=ops.QuantizedWeight(torch.zeros(5, 3, dtype=torch.int8), torch.ones(4), 8)),
            r"scale must have shape \[5\]",
        ),
        (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], not 1.5"),
        (dict(weight=torch.zeros(5, 2)), r"hidden must be \[T, H\] and weight \[V, H\]"),
        (
            dict(token_weight=torch.zeros(4, dtype=torch.float64)),
            r"token_weight must be float32 \[4\]",
        ),
    ],
)
def test_errors(backend, checked_values, arguments, sentence):
    call = dict(
        hidden=torch.zeros(4, 3), weight=torch.zeros(5, 3), labels=torch.tensor([0, 1, 2, 3])
    )
    call |= backend.on_device(arguments)
    with pytest.raises(ValueError, match=sentence):
        ops.linear_cross_entropy(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **call)


def test_no_cuda_graph_takes_the_op():
    """It reads from a GPU how many rows are labelled: torch.compile must leave it outside."""
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in library.linear_cross_entropy_fwd.default.tags
    assert unsafe not in library.linear_cross_entropy_bwd.default.tags
