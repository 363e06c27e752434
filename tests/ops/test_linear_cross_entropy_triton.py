"""The Triton linear_cross_entropy: against float64, chunks, and what only a kernel can get
wrong."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import linear_cross_entropy as kernels
from tests.ops.formulas import linear_cross_entropy
from tests.ops.numerics import HALF_AND_SINGLE, matches_fp64, poisoned_memory, same_bits
from tests.ops.test_linear_cross_entropy import labelled

library = torch.ops.glmkern
# tokens, width, classes, whether with token_weight; 33 classes are two blocks of 32
CASES = [(1, 1, 2, False), (4, 3, 7, True), (5, 20, 33, False)]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("tokens", "width", "classes", "weighted"), CASES)
def test_against_fp64(tokens, width, classes, weighted, dtype, device, monkeypatch):
    # Several chunks and blocks. The loss is one number a draw, so that there are many draws, and
    # the interpreter needs milliseconds a row.
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 3 * classes)
    monkeypatch.setattr(kernels, "LEAST_CHUNK_ROWS", 1)
    monkeypatch.setattr(kernels, "MAX_COLUMNS", 32)
    weight = torch.randn(classes, width).to(device, dtype)
    labels = labelled(tokens, classes).to(device)
    token_weight = torch.rand(tokens).to(device) if weighted else None

    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels, token_weight=token_weight),
        lambda h: linear_cross_entropy(h, weight, labels, token_weight),
        lambda: [torch.randn(tokens, width).to(device, dtype).requires_grad_()],
    )


@pytest.mark.parametrize(("bits", "smoothing"), [(8, 0.0), (4, 0.2), (8, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantised_weight_and_label_smoothing(dtype, bits, smoothing, device, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_COLUMNS", 16)
    packed, scale, _ = ops.quantize(torch.randn(37, 16).half(), bits)
    weight = ops.QuantizedWeight(packed.to(device), scale.to(device), bits)
    labels = labelled(5, 37).to(device)
    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels, label_smoothing=smoothing),
        lambda h: linear_cross_entropy(h, weight, labels, None, smoothing),
        lambda: [torch.randn(5, 16).to(device, dtype).requires_grad_()],
        sample=30,
    )


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_logits_far_from_and_near_zero(size, device):
    weight, labels = torch.randn(30, 8).to(device) * size, labelled(9, 30).to(device)
    matches_fp64(
        lambda h: ops.linear_cross_entropy(h, weight, labels),
        lambda h: F.cross_entropy(h @ weight.to(h.dtype).T, labels),
        lambda: [torch.randn(9, 8).to(device).requires_grad_()],
    )


@pytest.mark.parametrize("classes", [5, 9001])
def test_a_row_of_logits(classes, device):
    """Blocks whose largest logit comes first, last or is everywhere the same; -inf, which some
    lanes of a block see alone."""
    z = torch.randn(5, classes, dtype=torch.float64)
    z[0], z[1], z[2] = z[0].sort()[0] * 50, z[1].sort(descending=True)[0] * 50, -1e30
    z[3, 1:] = -torch.inf
    z[4, classes // 2 :] = -torch.inf
    z, labels = z.float().to(device), torch.tensor([classes - 1, 0, 1, 0, 1], device=device)
    weight, loss = torch.rand(5, device=device), torch.full((5,), torch.nan, device=device)
    exact = weight.double() * F.cross_entropy(z.double(), labels, reduction="none")
    softmax = z.double().softmax(1)
    softmax[torch.arange(5), labels] -= 1
    kernels.cross_entropy(untouched := z.clone(), labels, weight, loss, False)
    assert same_bits(untouched, z)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-6)
    kernels.cross_entropy(z, labels, weight, loss_too := torch.empty_like(loss), True)
    assert same_bits(loss_too, loss)
    torch.testing.assert_close(z.double(), softmax, rtol=0, atol=1e-6)


def test_not_a_number_stays_one(device):
    z = torch.randn(2, 300, device=device)
    z[1, 7] = torch.nan
    loss = torch.empty(2, device=device)
    kernels.cross_entropy(z, torch.tensor([3, 3], device=device), loss.new_ones(2), loss, True)
    assert loss.isnan().tolist() == [False, True]
    assert z.isnan().any(1).tolist() == [False, True]


def test_only_labelled_rows_matter(device):
    hidden, weight = torch.randn(6, 4, device=device), torch.randn(9, 4, device=device)
    labels = torch.tensor([-100, 3, -100, 8, 0, -100], device=device)
    expected = ops.linear_cross_entropy(hidden, weight, labels)
    hidden[labels == -100] = float("nan")
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss == expected
    assert (hidden.grad[labels == -100] == 0).all()
    assert ops.linear_cross_entropy(
        hidden[:1].detach(), weight, labels[1:2], ignore_index=-1
    ).isnan()


def test_chunks_are_as_equal_as_they_can_be(device, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 40)
    monkeypatch.setattr(kernels, "LEAST_CHUNK_ROWS", 3)
    hidden, weight = torch.randn(11, 4, device=device), torch.randn(10, 4, device=device)
    with mock.patch.object(kernels, "cross_entropy", wraps=kernels.cross_entropy) as rows:
        ops.linear_cross_entropy(hidden, weight, labels=torch.arange(11, device=device) % 10)
    assert [len(call.args[0]) for call in rows.call_args_list] == [3, 4, 4]


def test_without_gradient(device):
    hidden, weight = torch.randn(9, 8, device=device), torch.randn(30, 8, device=device)
    arguments = hidden, weight, None, 32, labelled(9, 30).to(device), None, -100, 0.0
    with poisoned_memory():
        loss, dhidden = library.linear_cross_entropy_fwd(*arguments, False)
        loss_too, dhidden_too = library.linear_cross_entropy_fwd(*arguments, True)
    assert dhidden.shape == (0,)
    assert dhidden_too.shape == (9, 8)
    assert same_bits(loss, loss_too)


def test_a_loss_scale_acts_before_rounding_to_half(device):
    hidden = torch.randn(8, 16).to(device).half().requires_grad_()
    weight, labels = (torch.randn(50, 16) * 1e-3).to(device).half(), torch.randint(50, (8,))
    tiny = torch.full((8,), 1e-6, device=device)
    loss = ops.linear_cross_entropy(hidden, weight, labels.to(device), token_weight=tiny)
    (loss * 2**20).backward()
    assert (hidden.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 20), (3, 1100)], ids=str)
def test_backward_scales(shape, dtype, device):
    dhidden, dloss = torch.randn(shape, device=device), torch.tensor(3.7, device=device)
    with poisoned_memory():
        result = library.linear_cross_entropy_bwd(dloss, dhidden, dtype)
    assert same_bits(result, (dhidden * dloss).to(dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_same_bits_every_time(dtype, device):
    hidden, weight = torch.randn(50, 70).to(device, dtype), torch.randn(300, 70).to(device, dtype)
    labels = labelled(50, 300).to(device)
    with poisoned_memory():
        first, second = (
            library.linear_cross_entropy_fwd(
                hidden, weight, None, 8 * weight.element_size(), labels, None, -100, 0.0, True
            )
            for _ in range(2)
        )
    assert all(map(same_bits, first, second))


@pytest.mark.parametrize("classes", [1, 7, 513, 4097])
def test_touches_nothing_outside(classes, device, monkeypatch):
    """The logits lie between NaNs, which do not come in and stay; so do the losses."""
    margin = 5000
    buffer = torch.full((2 * margin + 3 * classes,), torch.nan, device=device)
    losses = torch.full((3 + 64,), torch.nan, device=device)
    logits = buffer[margin:-margin].view(3, classes).normal_()
    labels = torch.randint(classes, (3,)).to(device)
    kernels.cross_entropy(logits, labels, logits.new_ones(3), losses[:3], True)
    assert logits.isfinite().all()
    assert losses[:3].isfinite().all()
    assert losses[3:].isnan().all()
    assert buffer[:margin].isnan().all()
    assert buffer[-margin:].isnan().all()
    guarded = torch.full((2 * margin + classes,), 7.0, device=device)
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype: guarded[None, margin:-margin])
    kernels.linear_cross_entropy_bwd(losses[0], logits[:1], torch.float32)
    assert same_bits(guarded[margin:-margin], logits[0] * losses[0])
    assert (guarded[:margin] == 7.0).all()
    assert (guarded[-margin:] == 7.0).all()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([-100, -100], "no row carries a label"),
        ([0, 5], "labels run from 0 to 5, but the classes are 0 to 4"),
    ],
)
def test_labels_are_checked_where_reading_them_is_free(labels, sentence, device, monkeypatch):
    monkeypatch.setenv("GLMKERN_CHECK", "1")
    hidden, weight = torch.zeros(2, 3, device=device), torch.zeros(5, 3, device=device)
    with pytest.raises(ValueError, match=sentence):
        ops.linear_cross_entropy(hidden, weight, torch.tensor(labels, device=device))


def test_forced_backend_runs_the_kernels(device):
    hidden = torch.ones(2, 8, device=device, requires_grad=True)
    weight, labels = torch.ones(4, 8, device=device), torch.tensor([1, 2], device=device)
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.linear_cross_entropy(hidden, weight, labels).backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.cross_entropy_kernel,
        kernels.scale_kernel,
    ]


def test_forced_backend_refuses_float64(device):
    hidden, weight = (torch.ones(s, 8, dtype=torch.float64, device=device) for s in (2, 4))
    with pytest.raises(RuntimeError, match="'triton' is forced, but cannot serve linear_cross"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([1, 2], device=device))
