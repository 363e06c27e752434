"""linear_cross_entropy against float64, chunking, its registration and its errors."""

import sys

import pytest
import torch
import torch.nn.functional as F

import glmkern
from glmkern import ops
from tests.ops.contract import check_compiles, check_registration
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64

# The package's attribute of that name is the function.
module = sys.modules["glmkern.ops.linear_cross_entropy"]
SHAPES = [(1, 1, 2), (5, 3, 7), (17, 64, 100), (63, 33, 257)]  # T, H, V


def labelled(tokens, classes):
    labels = torch.randint(classes, (tokens,))
    labels[torch.rand(tokens) < 0.4] = -100
    labels[-1] = classes - 1
    return labels


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "width", "classes"), SHAPES)
def test_against_fp64(tokens, width, classes, weighted, dtype, monkeypatch):
    # Several chunks, the last one ragged.
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 8 * classes)
    monkeypatch.setattr(module, "LEAST_CHUNK_ROWS", 1)
    weight, labels = torch.randn(classes, width).to(dtype), labelled(tokens, classes)
    token_weight = torch.rand(tokens) if weighted else None

    def formula(hidden):
        logits = hidden @ weight.to(hidden.dtype).T
        logits = logits if hidden.dtype == torch.float64 else logits.float()
        if not weighted:
            return F.cross_entropy(logits, labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * token_weight.to(losses.dtype)).sum()

    matches_fp64(lambda h: ops.linear_cross_entropy(h, weight, labels, token_weight=token_weight),
                 formula, lambda: [torch.randn(tokens, width).to(dtype).requires_grad_()])


def test_only_labelled_rows_matter():
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    labels = torch.tensor([-100, 3, -100, 8, 0, -100])
    expected = ops.linear_cross_entropy(hidden, weight, labels)
    hidden[labels == -100] = float("nan")
    assert ops.linear_cross_entropy(hidden, weight, labels) == expected


def test_unlabelled_rows_get_no_logits(monkeypatch):
    formed = []
    matmul = torch.Tensor.__matmul__

    def spy(a, b):
        formed.append(matmul(a, b))
        return formed[-1]

    labels = torch.full((40,), -100)
    labels[[3, 17, 39]] = 5
    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    with glmkern.backend("reference"):
        ops.linear_cross_entropy(torch.randn(40, 4), torch.randn(9, 4), labels)
    assert sum(len(x) for x in formed if x.shape[-1] == 9) == 3


def test_a_loss_scale_acts_before_rounding_to_half():
    hidden = torch.randn(8, 16).half().requires_grad_()
    weight, labels = (torch.randn(50, 16) * 1e-3).half(), torch.randint(50, (8,))
    tiny = torch.full((8,), 1e-6)
    loss = ops.linear_cross_entropy(hidden, weight, labels, token_weight=tiny)
    (loss * 2**20).backward()
    assert (hidden.grad != 0).float().mean() > 0.9


def test_registration():
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    labels, token_weight = torch.tensor([1, -100, 4, 0]), torch.rand(4)
    check_registration(torch.ops.glmkern.linear_cross_entropy_fwd.default,
                       (hidden, weight, labels, token_weight, -100, True))
    check_compiles(lambda h, labels: ops.linear_cross_entropy(h, weight, labels),
                   [[torch.randn(n, 3, requires_grad=True), torch.randint(5, (n,))]
                    for n in (4, 7)])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (dict(labels=torch.full((4,), -100)), "no row carries a label"),
    (dict(labels=torch.tensor([0, 5, 1, 2])), "labels run from 0 to 5, but the classes are 0 to 4"),
    (dict(labels=torch.tensor([0, -1, 1, 2])), "labels run from -1"),
    (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels must be int64 \[4\]"),
    (dict(weight=torch.zeros(5, 3, requires_grad=True)), "pass weight.detach"),
    (dict(weight=torch.zeros(5, 2)), r"hidden must be \[T, H\] and weight \[V, H\]"),
    (dict(token_weight=torch.zeros(4, dtype=torch.float64)), r"token_weight must be float32 \[4\]"),
])
def test_errors(arguments, sentence):
    call = dict(hidden=torch.zeros(4, 3), weight=torch.zeros(5, 3),
                labels=torch.tensor([0, 1, 2, 3])) | arguments
    with pytest.raises(ValueError, match=sentence):
        ops.linear_cross_entropy(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **call)
