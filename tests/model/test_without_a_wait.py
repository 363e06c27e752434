"""Between the first forward pass and the last backward pass of a step the host asks the GPU for
nothing, and sends it one buffer a pack."""

from unittest import mock

import pytest
import torch

from bench.fake_gpu import COPY, DEVICE, fake_gpu, host_copies, host_reads, launches
from bench.launches import fake_model
from glmkern import ChatGLMConfig
from glmkern.model.computation import Computation
from glmkern.model.packing import joined, move_together, pack_rows, split_again
from glmkern.training.data.rows import Row
from tests.model.models import EVEN, SMALL

CONFIG = ChatGLMConfig.from_dict(SMALL | EVEN)
ROWS = [Row([5, 6, 7, 8], [-100, -100, 7, 8]), Row([9, 10, 11], [-100, 10, 11])]


@pytest.mark.parametrize(
    "computation",
    [
        Computation(),
        Computation(prefix_dropout=0.0, label_smoothing=0.1),
        Computation(recompute="mlp"),
        Computation(recompute="layer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, [0.5, 0.25]])
def test_a_step_of_two_packs(computation, weights):
    packs = [pack_rows(ROWS, token_weight_per_row=weights) for _ in range(2)]
    with fake_gpu() as gpu:
        model = fake_model(CONFIG)
        model.computation = computation
        with gpu.recording() as events:
            for pack in packs:
                (model.loss(pack, dropout_offset=6, seed=3) * 1024).backward()
    assert launches(events)["prefix_attention_fwd"] >= 2 * CONFIG.num_layers
    assert model.prefix_encoder.embedding.weight.grad is not None
    assert host_reads(events) == []
    assert len(host_copies(events)) == len(packs)
    assert events[0].kind == COPY


def test_hidden_dropout_too():
    with fake_gpu() as gpu:
        model = fake_model(ChatGLMConfig.from_dict(vars(CONFIG) | dict(hidden_dropout=0.1)))
        with gpu.recording() as events:
            model.loss(pack_rows(ROWS)).backward()
    assert launches(events)["bias_dropout_add_bwd"] > 0
    assert host_reads(events) == []
    assert len(host_copies(events)) == 1


def test_a_buffer_gives_back_what_went_in():
    tensors = [
        torch.arange(5),
        torch.tensor([0, 3, 7], dtype=torch.int32),
        torch.randn(3),
        torch.zeros(0, dtype=torch.int64),
        torch.randint(2**62, (3, 2, 2)).transpose(0, 1),
        torch.tensor([True, False, True]),
    ]
    buffer = joined(tensors)
    assert buffer.dtype == torch.uint8
    for x, y in zip(tensors, split_again(buffer, tensors), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        assert y.numel() == 0 or (y.data_ptr() - buffer.data_ptr()) % 16 == 0


def test_what_is_on_the_device_already_stays():
    there = torch.empty(4, device=DEVICE)
    tensors = {"a": torch.arange(3), "b": None, "c": there, "d": torch.ones(2)}
    with fake_gpu() as gpu, gpu.recording() as events:
        moved = move_together(tensors, torch.device(DEVICE))
    assert moved["c"] is there
    assert moved["b"] is None
    assert moved["a"].shape == (3,)
    assert moved["a"].is_meta
    assert moved["d"].dtype == torch.float32
    assert len(host_copies(events)) == 1
    on_cpu = {"a": torch.arange(3), "b": None}
    assert move_together(on_cpu, torch.device("cpu"))["a"] is on_cpu["a"]


def test_what_is_on_another_gpu_moves_too():
    """Beside what comes from the host."""
    elsewhere, here = mock.Mock(spec=torch.Tensor, is_cpu=False), torch.device(DEVICE)
    moved = move_together({"a": torch.arange(3), "b": elsewhere}, here)
    assert moved["a"].is_meta
    assert moved["b"] is elsewhere.to.return_value
    elsewhere.to.assert_called_once_with(here)
