"""The training state, written and read without a trainer."""

import random

import pytest
import torch
from torch import nn

from glmkern.errors import InputError
from glmkern.training.loop.checkpoint import (
    Position,
    TrainingState,
    read_training_state,
    write_training_state,
)
from glmkern.training.loop.loss_scale import LossScale
from glmkern.training.output.trainer_state import TrainerState


def training_state(steps: int = 0, dtype: torch.dtype = torch.float32, **changes) -> TrainingState:
    """Of a run of four steps, `steps` of which are taken."""
    encoder = nn.ModuleDict({"embedding": nn.Embedding(2, 4)})
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        encoder["embedding"].weight.square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    values = {
        "loss_scale": LossScale() if dtype == torch.float16 else None,
        "trainer_state": TrainerState(global_step=steps, max_steps=4, num_train_epochs=2),
        "position": Position(micro_batches=2 * steps, window_loss=0.1 * steps, tokens=9 * steps),
        "rows": "a fingerprint",
        "dtype": dtype,
        **changes,
    }
    return TrainingState(encoder, optimizer, scheduler, **values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_written_is_read(tmp_path, dtype):
    saved = training_state(3, dtype)
    if saved.loss_scale is not None:
        saved.loss_scale.halve()
    write_training_state(tmp_path, saved)
    draws = torch.rand(3).tolist(), random.random()
    state = training_state(0, dtype)
    read_training_state(tmp_path, state)
    assert (torch.rand(3).tolist(), random.random()) == draws
    assert state.trainer_state == saved.trainer_state and state.position == saved.position
    weights = [each.prefix_encoder["embedding"].weight for each in (saved, state)]
    assert torch.equal(*weights)
    moments = [
        each.optimizer.state[weight]["exp_avg_sq"]
        for each, weight in zip((saved, state), weights, strict=True)
    ]
    assert torch.equal(*moments)
    assert state.scheduler.state_dict() == saved.scheduler.state_dict()
    if dtype == torch.float16:
        assert state.loss_scale.state_dict() == saved.loss_scale.state_dict()


def test_the_length_of_the_run_is_that_of_the_new_one(tmp_path):
    write_training_state(tmp_path, training_state(3))
    longer = TrainerState(max_steps=40, num_train_epochs=20)
    state = training_state(trainer_state=longer)
    read_training_state(tmp_path, state)
    assert (state.trainer_state.global_step, state.trainer_state.max_steps) == (3, 40)
    assert state.trainer_state.num_train_epochs == 20


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rows": "another"}, "comes from a run over other rows"),
        ({"dtype": torch.bfloat16}, "pass --model_dtype float32"),
        ({"trainer_state": TrainerState(max_steps=2)}, "raise --max_steps"),
        ({"loss_scale": LossScale()}, "has no scaler.pt"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, words):
    write_training_state(tmp_path, training_state(3))
    with pytest.raises(InputError, match=words):
        read_training_state(tmp_path, training_state(**changes))
