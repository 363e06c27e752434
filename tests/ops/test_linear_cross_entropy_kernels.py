"""What only a kernel of linear_cross_entropy can get wrong: bits, blocks, chunks, memory."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from glmkern import ops
from glmkern.triton_kernels import linear_cross_entropy as kernels
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory, same_bits
from tests.ops.test_linear_cross_entropy import labelled

OP = "linear_cross_entropy_fwd"
library = torch.ops.glmkern


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_same_bits_on_every_run_and_number_of_threads(backend, threads, dtype):
    hidden, weight = torch.randn(500, 70).to(dtype), torch.randn(300, 70).to(dtype)
    labels = labelled(500, 300)

    def run(count):
        threads(count)
        with poisoned_memory():
            loss, dhidden = library.linear_cross_entropy_fwd(
                hidden, weight, None, 8 * weight.element_size(), labels, None, -100, 0.0, True
            )
            scaled = library.linear_cross_entropy_bwd(torch.tensor(3.0), dhidden, dtype)
            return loss, dhidden, scaled

    first = run(1)
    for count in (1, 2, 3):
        assert all(map(same_bits, first, run(count)))


@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_same_bits_every_time(backend, dtype):
    hidden, weight = torch.randn(50, 70).to(dtype), torch.randn(300, 70).to(dtype)
    labels = labelled(50, 300)
    with poisoned_memory():
        first, second = (
            library.linear_cross_entropy_fwd(
                hidden, weight, None, 8 * weight.element_size(), labels, None, -100, 0.0, True
            )
            for _ in range(2)
        )
    assert all(map(same_bits, first, second))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("classes", [5, 9001])
def test_a_row_of_logits(backend, classes):
    """Blocks whose largest logit comes first, last or is everywhere the same; -inf, which some
    lanes of a block see alone."""
    z = torch.randn(5, classes, dtype=torch.float64)
    z[0], z[1], z[2] = z[0].sort()[0] * 50, z[1].sort(descending=True)[0] * 50, -1e30
    z[3, 1:] = -torch.inf
    z[4, classes // 2 :] = -torch.inf
    z, labels = z.float(), torch.tensor([classes - 1, 0, 1, 0, 1])
    weight, loss = torch.rand(5), torch.full((5,), torch.nan)
    exact = weight.double() * F.cross_entropy(z.double(), labels, reduction="none")
    softmax = z.double().softmax(1)
    softmax[torch.arange(5), labels] -= 1
    kernels.cross_entropy(untouched := z.clone(), labels, weight, loss, False)
    assert same_bits(untouched, z)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=1e-6)
    kernels.cross_entropy(z, labels, weight, loss_too := torch.empty_like(loss), True)
    assert same_bits(loss_too, loss)
    torch.testing.assert_close(z.double(), softmax, rtol=0, atol=1e-6)


@pytest.mark.backends("triton")
def test_not_a_number_stays_one(backend):
    z = torch.randn(2, 300)
    z[1, 7] = torch.nan
    loss = torch.empty(2)
    kernels.cross_entropy(z, torch.tensor([3, 3]), loss.new_ones(2), loss, True)
    assert loss.isnan().tolist() == [False, True]
    assert z.isnan().any(1).tolist() == [False, True]


@pytest.mark.backends("triton")
def test_chunks_are_as_equal_as_they_can_be(backend, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 40)
    monkeypatch.setattr(kernels, "LEAST_CHUNK_ROWS", 3)
    hidden, weight = torch.randn(11, 4), torch.randn(10, 4)
    with mock.patch.object(kernels, "cross_entropy", wraps=kernels.cross_entropy) as rows:
        ops.linear_cross_entropy(hidden, weight, labels=torch.arange(11) % 10)
    assert [len(call.args[0]) for call in rows.call_args_list] == [3, 4, 4]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("classes", [1, 7, 513, 4097])
def test_touches_nothing_outside(backend, classes, monkeypatch):
    """The logits lie between NaNs, which do not come in and stay; so do the losses."""
    margin = 5000
    buffer = torch.full((2 * margin + 3 * classes,), torch.nan)
    losses = torch.full((3 + 64,), torch.nan)
    logits = buffer[margin:-margin].view(3, classes).normal_()
    labels = torch.randint(classes, (3,))
    kernels.cross_entropy(logits, labels, logits.new_ones(3), losses[:3], True)
    assert logits.isfinite().all()
    assert losses[:3].isfinite().all()
    assert losses[3:].isnan().all()
    assert buffer[:margin].isnan().all()
    assert buffer[-margin:].isnan().all()
    guarded = torch.full((2 * margin + classes,), 7.0)
    monkeypatch.setattr(torch, "empty_like", lambda like, dtype: guarded[None, margin:-margin])
    kernels.linear_cross_entropy_bwd(losses[0], logits[:1], torch.float32)
    assert same_bits(guarded[margin:-margin], logits[0] * losses[0])
    assert (guarded[:margin] == 7.0).all()
    assert (guarded[-margin:] == 7.0).all()


@pytest.mark.backends("triton")
def test_forced_backend_runs_the_kernels(backend):
    hidden = torch.ones(2, 8, requires_grad=True)
    weight, labels = torch.ones(4, 8), torch.tensor([1, 2])
    with mock.patch.object(kernels, "launch", wraps=kernels.launch) as launch:
        ops.linear_cross_entropy(hidden, weight, labels).backward()
    assert [call.args[0] for call in launch.call_args_list] == [
        kernels.cross_entropy_kernel,
        kernels.scale_kernel,
    ]
