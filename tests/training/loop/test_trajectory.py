"""Whole runs, against recorded ones of the official Trainer."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler

from glmkern.model.computation import Computation
from tests.training.stand_in import OFFICIAL, Recorder, arguments


def follow(golden, tiny, rows, recorded: str, projection: bool, **flags):
    """Ten steps as recorded; returns the largest errors of the losses and of the prefix."""
    name = f"train_{recorded}_adamw_{'proj' if projection else 'noproj'}"
    case = json.loads((golden / "chatglm2_tiny" / "cases.json").read_text())[name]
    model = tiny(projection)
    model.computation = Computation(prefix_dropout=0.0)
    trainer = Recorder(
        model,
        rows,
        arguments(
            per_device_train_batch_size=case["micro_batch"],
            max_steps=case["steps"],
            gradient_accumulation_steps=case["grad_accum"],
            learning_rate=case["lr"],
            max_grad_norm=case["max_grad_norm"],
            **flags,
        ),
        sampler=SequentialSampler(rows),
    )
    trainer.train()
    end = load_file(golden / "chatglm2_tiny" / f"{name}.safetensors")
    loss_error = max(abs(a - b) for a, b in zip(trainer.losses, case["losses"], strict=True))
    prefix_error = max(
        float((value - end[OFFICIAL + key]).abs().max())
        for key, value in model.prefix_encoder.state_dict().items()
    )
    return loss_error, prefix_error


@pytest.mark.parametrize("tokens_per_pack", ["0", "20", "auto"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("recorded, optim", [("hf", "adamw_hf"), ("torch", "adamw_torch")])
def test_golden_trajectory(golden, tiny, tiny_rows, recorded, optim, projection, tokens_per_pack):
    loss_error, prefix_error = follow(
        golden, tiny, tiny_rows, recorded, projection, optim=optim, tokens_per_pack=tokens_per_pack
    )
    assert loss_error <= 5e-6
    assert prefix_error <= 1e-4


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("recorded, optim", [("hf", "adamw_torch"), ("torch", "adamw_hf")])
def test_wrong_place_of_eps_leaves_the_trajectory(
    golden, tiny, tiny_rows, recorded, optim, projection
):
    loss_error, prefix_error = follow(golden, tiny, tiny_rows, recorded, projection, optim=optim)
    assert loss_error > 5e-6
    assert prefix_error > 1e-4


def test_packing_changes_neither_masks_nor_gradient(tiny, tiny_rows):
    ends = []
    for tokens_per_pack in ("0", "1", "37", "auto"):
        model = tiny(projection=False)
        trainer = Recorder(
            model,
            tiny_rows,
            arguments(
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                max_steps=4,
                learning_rate=1e-3,
                adam_epsilon=1e-3,
                tokens_per_pack=tokens_per_pack,
            ),
        )
        trainer.train()
        ends.append((trainer.losses, model.prefix_encoder.embedding.weight.detach()))
    for losses, prefix in ends[1:]:
        assert losses == pytest.approx(ends[0][0], abs=1e-5)
        torch.testing.assert_close(prefix, ends[0][1], rtol=0, atol=1e-6)
