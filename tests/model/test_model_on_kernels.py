"""The whole model over the kernels for GPUs, Triton's and CUDA C++'s, against the reference
implementations on the CPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import glmkern
from bench.oracles import relative_error
from glmkern import ChatGLM
from glmkern.model.packing import unpad
from tests.backends import CUDA, TRITON, Backend, available
from tests.model.models import EVEN, padded_batch, small_model
from tests.ops.numerics import same_bits

LENGTHS = [7, 1, 12]


@pytest.fixture(params=[TRITON, CUDA], ids=str)
def kernels(request) -> Iterator[Backend]:
    with available(request.param):
        yield request.param


def results(model: ChatGLM, batch: dict[str, Tensor], backend: str, device: str) -> list[Tensor]:
    """Logits, loss and the prefix's gradient, with dropout of the hidden states."""
    batch = {name: x.to(device) for name, x in batch.items()}
    with glmkern.backend(backend):
        loss = model.train().loss(unpad(**batch)[0], seed=3)
        (gradient,) = torch.autograd.grad(loss, model.prefix_encoder.embedding.weight)
        with torch.no_grad():
            logits = model.eval()(**batch).logits
    return [x.detach().cpu().double() for x in (logits, loss, gradient)]


def make(bits: int | None, dtype: torch.dtype) -> tuple[ChatGLM, dict[str, Tensor]]:
    model = small_model(EVEN | dict(hidden_dropout=0.2, num_layers=2), dtype=dtype)
    if bits is not None:
        model.quantize(bits)
    return model, padded_batch(LENGTHS, model.config.padded_vocab_size, "right")


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_float32(bits, kernels):
    model, batch = make(bits, torch.float32)
    exact = results(model, batch, "reference", "cpu")
    ours = results(model.to(kernels.device), batch, kernels.name, kernels.device)
    for result, expected in zip(ours, exact, strict=True):
        assert relative_error(result, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_as_near_as_the_reference(dtype, kernels):
    model, batch = make(4, dtype)
    exact = results(copy.deepcopy(model).float(), batch, "reference", "cpu")
    theirs = results(model.to(kernels.device), batch, "reference", kernels.device)
    ours = results(model, batch, kernels.name, kernels.device)
    for result, usual, expected in zip(ours, theirs, exact, strict=True):
        assert relative_error(result, expected) <= (
            3 * relative_error(usual, expected) + torch.finfo(dtype).eps
        )


def test_the_same_bits_on_every_run(kernels):
    model, batch = make(4, torch.bfloat16)
    runs = [
        results(model.to(kernels.device), batch, kernels.name, kernels.device) for _ in range(2)
    ]
    assert all(same_bits(a, b) for a, b in zip(*runs, strict=True))


def test_generates_the_same(kernels):
    model, _ = make(4, torch.float32)
    prompt = torch.tensor([[3, 14, 15, 92]])
    replies = []
    for backend, place in (("reference", "cpu"), (kernels.name, kernels.device)):
        with glmkern.backend(backend):
            replies.append(
                model.to(place).generate(prompt.to(place), max_length=10, do_sample=False).cpu()
            )
    assert torch.equal(*replies)
