"""Seeds, dropout, logs and failures of the training loop."""

import ast
import random
from dataclasses import replace

import pytest
import torch
from torch.utils.data import SequentialSampler

from glmkern.errors import TrainingError
from glmkern.training.data.rows import Row
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from glmkern.training.output.trainer_state import metrics_table
from tests.training.stand_in import (
    IGNORED,
    Recorder,
    StandIn,
    arguments,
    make_runs_last,
    simple_rows,
)


def test_the_seed_reaches_every_generator():
    draws = []
    for _ in range(2):
        Trainer(StandIn(), simple_rows(2), arguments(seed=3))
        draws.append((random.random(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_dropout_is_switched_on():
    model = StandIn().eval()
    Trainer(model, simple_rows(1), arguments(max_steps=1)).train()
    assert model.training


def test_dropout_offset_and_sequence_ids_follow_the_step():
    model = StandIn()
    Trainer(
        model,
        simple_rows(8),
        arguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            seed=9,
            tokens_per_pack="8",
        ),
    ).train()
    assert [call.offset for call in model.calls] == [0, 0, 3, 3, 6, 6]
    assert {call.seed for call in model.calls} == {9}
    ids = [call.batch.sequence_ids.tolist() for call in model.calls]
    assert ids == [[0, 1], [2, 3]] * 3


def test_log_lines_and_history(capsys, monkeypatch):
    make_runs_last(3.5, monkeypatch)
    trainer = Recorder(
        StandIn(),
        simple_rows(12),
        arguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=7,
            learning_rate=0.5,
            logging_steps=3,
            logging_first_step=True,
        ),
    )
    metrics = trainer.train()
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("{")]
    *logs, final = trainer.state.log_history
    assert [log["step"] for log in logs] == [1, 3, 6]
    assert [log["epoch"] for log in logs] == [0.33, 1.0, 2.0]
    means = [trainer.losses[0], sum(trainer.losses[1:3]) / 2, sum(trainer.losses[3:6]) / 3]
    assert [log["loss"] for log in logs] == [round(mean, 4) for mean in means]
    # The rate is that of the next step.
    assert [log["learning_rate"] for log in logs] == pytest.approx(
        [0.5 * (7 - s) / 7 for s in (1, 3, 6)]
    )
    first = logs[0]
    assert lines[0] == str({name: first[name] for name in ("loss", "learning_rate", "epoch")})
    assert len(lines) == 4 and list(ast.literal_eval(lines[3])) == [
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
        "epoch",
    ]
    assert metrics["train_loss"] == pytest.approx(sum(trainer.losses) / 7)
    assert final.keys() == {*metrics, "step", "total_flos"}
    assert metrics["train_runtime"] == 3.5
    assert metrics["train_samples_per_second"] == 7 * 4 / 3.5
    assert metrics["train_steps_per_second"] == 7 / 3.5


@pytest.mark.parametrize(
    "flags, steps",
    [
        ({"logging_steps": 0.25}, [3, 6, 9]),
        ({"logging_strategy": "epoch"}, [3, 6, 9, 10]),
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    ],
)
def test_when_it_logs(flags, steps):
    trainer = Trainer(
        StandIn(), simple_rows(12), arguments(per_device_train_batch_size=4, max_steps=10, **flags)
    )
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history[:-1]] == steps


def test_metrics_table():
    assert metrics_table(
        {"epoch": 98.36, "train_loss": 3.123456, "train_runtime": 3725.678, "train_samples": 243}
    ) == [
        "***** train metrics *****",
        "  epoch         =      98.36",
        "  train_loss    =     3.1235",
        "  train_runtime = 1:02:05.67",
        "  train_samples =        243",
    ]


def test_a_nan_loss_stops_the_run_and_names_step_and_rows(tmp_path):
    rows = simple_rows(12)
    rows[5] = Row([1] * 4, [IGNORED, 1, 2, StandIn.nan_label])
    order = SequentialSampler(rows)
    trainer = Trainer(
        StandIn(),
        rows,
        arguments(
            per_device_train_batch_size=2,
            tokens_per_pack="0",
            max_steps=6,
            save_steps=1,
            learning_rate=0.1,
        ),
        sampler=order,
        folder=RunFolder(tmp_path),
        row_names=[f"line {i}" for i in range(12)],
    )
    with pytest.raises(TrainingError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(
        "step 3: the loss is nan (rows line 4, line 5); last good checkpoint:"
        f" {tmp_path}/checkpoint-2; lower --learning_rate (now 0.1) or "
    )
    assert "\n" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert torch.isfinite(trainer.model.scores).all()


def test_a_gradient_that_is_not_finite_stops_a_float32_run():
    rows = simple_rows(12)
    rows[7] = Row([1] * 4, [IGNORED, 1, 2, StandIn.steep_label])
    trainer = Trainer(
        StandIn(),
        rows,
        arguments(per_device_train_batch_size=4, max_steps=3),
        sampler=SequentialSampler(rows),
    )
    with pytest.raises(TrainingError, match=r"step 2: the gradient is not finite \(rows 4, 5, 6"):
        trainer.train()
    assert torch.isfinite(trainer.model.scores).all()


def test_out_of_memory_says_what_to_lower():
    class Full(StandIn):
        def loss(self, batch, dropout_offset, seed):
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = Trainer(Full(), simple_rows(3), arguments(max_steps=1))
    with pytest.raises(TrainingError, match="ran out of GPU memory .*lower --tokens_per_pack"):
        trainer.train()


def test_many_rows_are_named_in_part():
    rows = simple_rows(40)
    rows[0] = Row([1] * 4, [IGNORED, 1, 2, StandIn.nan_label])
    trainer = Trainer(
        StandIn(),
        rows,
        arguments(per_device_train_batch_size=40, max_steps=1),
        sampler=SequentialSampler(rows),
    )
    with pytest.raises(TrainingError, match="14, 15 and 24 more"):
        trainer.train()


def test_a_row_without_a_label_is_refused():
    rows = [*simple_rows(3), Row([1, 2], [2, IGNORED])]
    with pytest.raises(ValueError, match="row 3 has no token to predict"):
        Trainer(StandIn(), rows, arguments())


@pytest.mark.parametrize("max_grad_norm, moved", [(0.25, 0.25), (0, 2.0)])
def test_clipping(max_grad_norm, moved):
    """Plain gradient descent with a gradient of norm 2."""

    class Pulled(StandIn):
        def loss(self, batch, dropout_offset, seed):
            return -2 * self.scores[0, 0]

    trainer = Trainer(Pulled(), simple_rows(1), arguments(max_steps=1, max_grad_norm=max_grad_norm))
    weight = trainer.gradient.parameters[0]
    trainer.optimizer = torch.optim.SGD([weight], lr=1.0)
    trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    trainer.train()
    assert weight[0, 0].item() == pytest.approx(moved, rel=1e-5)


def test_arguments_are_not_changed_by_training():
    args = arguments(logging_steps=0.5, save_steps=0.5, max_steps=4)
    before = replace(args)
    Trainer(StandIn(), simple_rows(4), args).train()
    assert args == before
