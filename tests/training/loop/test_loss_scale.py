"""Half precision: the loss scale, repeated steps, and when a run gives up."""

import pytest
import torch

from glmkern.errors import TrainingError
from glmkern.training.data.rows import Row
from glmkern.training.loop.loss_scale import LossScale
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training import children
from tests.training.children import random_rows
from tests.training.stand_in import IGNORED, Recorder, StandIn, arguments, simple_rows


def test_an_overflowing_step_is_repeated_with_the_same_masks(tiny, tiny_rows, capsys):
    def run(scale: float):
        model = tiny(projection=False, dtype=torch.float16)
        trainer = Recorder(
            model,
            tiny_rows,
            arguments(
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=3,
                learning_rate=1e-2,
            ),
        )
        trainer.gradient.loss_scale = LossScale(scale)
        trainer.train()
        return model.prefix_encoder.embedding.weight.detach(), trainer

    plain, calm = run(2.0**10)
    assert calm.loss_scale.overflows == 0 and calm.loss_scale.value == 2.0**10
    repeated, stormy = run(2.0**30)
    assert stormy.loss_scale.overflows > 3
    assert stormy.loss_scale.value == 2.0**30 / 2**stormy.loss_scale.overflows
    assert len(stormy.losses) == 3 + stormy.loss_scale.overflows
    assert set(stormy.losses) == set(calm.losses)
    # A power of two changes no bit, and the masks of a repeated step are the same.
    assert torch.equal(repeated, plain)
    assert f"({stormy.loss_scale.overflows} times so far)" in capsys.readouterr().out


def test_a_scaled_up_row_halves_the_scale_and_the_run_goes_on(capsys):
    """A row of the output layer times 100 makes the float16 gradient overflow at the first scale;
    the run ends with the bits of one whose scale was low from the start."""

    def run(factor: float, scale: float | None = None):
        model = children.model(torch.float16)
        with torch.no_grad():
            model.transformer.output_layer.weight[77] *= factor
        trainer = Recorder(
            model,
            random_rows(12, 14),
            arguments(
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=6,
                learning_rate=1e-3,
            ),
        )
        if scale is not None:
            trainer.gradient.loss_scale = LossScale(scale)
        trainer.train()
        return model.prefix_encoder.embedding.weight.detach(), trainer

    assert run(1)[1].loss_scale.overflows == 0
    capsys.readouterr()
    stormy, overflowing = run(100)
    overflows, scale = overflowing.loss_scale.overflows, overflowing.loss_scale.value
    assert overflows > 0 and scale == 2.0**16 / 2**overflows
    lines = [line for line in capsys.readouterr().out.split("\n") if "overflowed" in line]
    assert len(lines) == overflows
    assert lines[-1].endswith(f"repeated with loss scale {scale:g} ({overflows} times so far)")
    calm, quiet = run(100, scale)
    assert quiet.loss_scale.overflows == 0
    assert torch.equal(stormy, calm)
    assert set(overflowing.losses) == set(quiet.losses)


def test_the_gradient_is_unscaled():
    """Without clipping and with a large eps, Adam's step depends on the gradient's size."""
    ends = []
    for dtype in (torch.float32, torch.float16):
        model = StandIn(dtype)
        Trainer(
            model,
            simple_rows(8),
            arguments(max_steps=3, max_grad_norm=0, adam_epsilon=0.1, learning_rate=0.1),
        ).train()
        ends.append(model.scores.detach())
    assert ends[0].abs().max() > 0.005
    assert torch.equal(*ends)


def test_only_float16_is_scaled(tiny, tiny_rows):
    kinds = {
        dtype: Trainer(tiny(False, dtype), tiny_rows, arguments()).loss_scale
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert kinds[torch.float32] is None and kinds[torch.bfloat16] is None
    assert kinds[torch.float16].value == 2.0**16


def test_float16_stops_below_a_scale_of_one():
    rows = simple_rows(4)
    rows[1] = Row([1] * 4, [IGNORED, 1, 2, StandIn.steep_label])
    trainer = Trainer(StandIn(torch.float16), rows, arguments(max_steps=1))
    with pytest.raises(
        TrainingError,
        match="step 1: the float16 gradient overflows even with a "
        "loss scale of 1.*--model_dtype bfloat16",
    ):
        trainer.train()
    assert trainer.loss_scale.overflows == 16


def test_a_nan_loss_is_not_taken_for_an_overflow():
    rows = [Row([1] * 4, [IGNORED, 1, 2, StandIn.nan_label])]
    trainer = Trainer(StandIn(torch.float16), rows, arguments(max_steps=1))
    with pytest.raises(TrainingError, match="the loss is nan"):
        trainer.train()
    assert trainer.loss_scale.overflows == 0


def test_loss_scale_grows_again():
    scale = LossScale(4.0, growth_interval=3)
    assert scale.halve() and scale.value == 2.0
    for _ in range(3):
        scale.succeeded()
    assert scale.value == 4.0
    scale.succeeded()
    assert scale.value == 4.0 and scale.state_dict()["_growth_tracker"] == 1
    scale.value = 1.0
    assert not scale.halve() and scale.value == 1.0


def test_the_scale_is_in_the_checkpoint(tmp_path):
    Trainer(
        StandIn(torch.float16),
        simple_rows(4),
        arguments(max_steps=2, save_steps=2),
        folder=RunFolder(tmp_path),
    ).train()
    state = torch.load(tmp_path / "checkpoint-2" / "scaler.pt", weights_only=True)
    assert state["scale"] == 2.0**16 and state["_growth_tracker"] == 2
