"""The loop: golden trajectories of the official code, the floor rule, order, logs, failures."""

import ast
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import expected_shapes
from glmkern.errors import TrainingError
from glmkern.model.computation import Computation
from glmkern.model.config import ChatGLMConfig
from glmkern.training.data.rows import Row
from glmkern.training.loop.steps import StepPlan
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from glmkern.training.output.trainer_state import metrics_table
from tests.training.stand_in import IGNORED, OFFICIAL, Recorder, StandIn, arguments, simple_rows


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


@pytest.mark.parametrize(
    "rows, batch, accumulation, epochs, max_steps, expected",
    [
        (243, 4, 4, 100, -1, (61, 1500, 100)),
        (243, 1, 16, 3, -1, (243, 45, 3)),
        (10, 1, 4, 2, -1, (10, 4, 2)),
        (10, 4, 16, 3, -1, (3, 3, 3)),
        (10, 4, 16, 2.5, -1, (3, 3, 3)),
        (100, 10, 2, 0.5, -1, (10, 3, 1)),
        (243, 1, 16, 3, 3000, (243, 3000, 200)),
        (243, 4, 4, 3, 16, (61, 16, 2)),
    ],
)
def test_floor_rule(rows, batch, accumulation, epochs, max_steps, expected):
    plan = StepPlan.of(
        rows,
        arguments(
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            gradient_accumulation_steps=accumulation,
            max_steps=max_steps,
        ),
    )
    assert (plan.batches_per_epoch, plan.max_steps, plan.num_train_epochs) == expected


def test_dropping_the_last_batch():
    flags = {"per_device_train_batch_size": 4, "max_steps": 5}
    kept = StepPlan.of(10, arguments(**flags))
    dropped = StepPlan.of(10, arguments(dataloader_drop_last=True, **flags))
    assert (kept.batches_per_epoch, dropped.batches_per_epoch) == (3, 2)
    trainer = Recorder(StandIn(), simple_rows(10), arguments(dataloader_drop_last=True, **flags))
    trainer.train()
    assert all(len(micro_batch) == 4 for window in trainer.windows for micro_batch in window)
    with pytest.raises(ValueError, match="do not fill a micro-batch of 4"):
        Trainer(StandIn(), simple_rows(3), arguments(dataloader_drop_last=True, **flags))


def test_a_hundred_epochs_of_243_rows_are_1500_steps():
    trainer = Recorder(
        StandIn(),
        simple_rows(243),
        arguments(
            per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=100
        ),
    )
    metrics = trainer.train()
    assert trainer.state.global_step == 1500
    assert sum(len(window) for window in trainer.windows) == 6000
    assert all(len(window) == 4 for window in trainer.windows)
    assert metrics["epoch"] == 98.36
    # An epoch's 61st micro-batch has the three rows left over, and belongs to the next step.
    sizes = [len(micro_batch) for window in trainer.windows for micro_batch in window]
    assert [place for place, size in enumerate(sizes, 1) if size == 3] == list(range(61, 6000, 61))


def test_header_of_the_official_shape(capsys):
    """28 layers, 2 groups of 128 channels, prefix 136; the base's other sizes do not matter."""
    config = ChatGLMConfig(
        num_layers=28,
        kv_channels=128,
        multi_query_attention=True,
        multi_query_group_num=2,
        num_attention_heads=2,
        hidden_size=16,
        ffn_hidden_size=16,
        padded_vocab_size=32,
    )
    model = ChatGLM(config, pre_seq_len=136)
    model.load_base(
        ((name, torch.zeros(shape)) for name, shape in expected_shapes(config).items()),
        torch.float32,
        "cpu",
    )

    class Stopped(Exception):
        pass

    class HeaderOnly(Trainer):
        def _train_epochs(self):
            raise Stopped

    with pytest.raises(Stopped):
        HeaderOnly(
            model,
            simple_rows(243),
            arguments(
                per_device_train_batch_size=4, gradient_accumulation_steps=4, num_train_epochs=100
            ),
        ).train()
    assert capsys.readouterr().out.split("\n") == [
        "***** Running training *****",
        "  Num examples = 243",
        "  Num Epochs = 100",
        "  Instantaneous batch size per device = 4",
        "  Total train batch size (w. parallel, distributed & accumulation) = 16",
        "  Gradient Accumulation steps = 4",
        "  Total optimization steps = 1,500",
        "  Number of trainable parameters = 1,949,696",
        "",
    ]


def test_an_epoch_shorter_than_a_step_ends_with_one():
    trainer = Recorder(
        StandIn(),
        simple_rows(5),
        arguments(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=4),
    )
    trainer.train()
    # The counter of micro-batches runs on, so its multiples of four end a step too.
    assert [len(window) for window in trainer.windows] == [3, 1, 2, 2]
    assert trainer.state.epoch == pytest.approx(2 + 2 / 3)


def test_a_short_step_is_still_divided_by_the_accumulation():
    trainer = Recorder(
        StandIn(),
        simple_rows(2),
        arguments(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1),
    )
    trainer.train()
    assert trainer.losses == [pytest.approx(math.log(8) / 4)]


def expected_orders(count: int, draw_seed: int | None, seed: int, epochs: int) -> list[list[int]]:
    """RandomSampler's: a permutation an epoch, and one drawn and thrown away at its end."""
    if draw_seed is None:
        torch.manual_seed(seed)
        draw_seed = int(torch.empty((), dtype=torch.int64).random_())
    generator = torch.Generator().manual_seed(draw_seed)
    orders = []
    for _ in range(epochs):
        orders.append(torch.randperm(count, generator=generator).tolist())
        torch.randperm(count, generator=generator)
    return orders


@pytest.mark.parametrize("data_seed", [None, 7])
def test_order_of_rows(data_seed):
    torch.rand(3)  # the order must not depend on earlier draws
    trainer = Recorder(
        StandIn(),
        simple_rows(11),
        arguments(per_device_train_batch_size=4, num_train_epochs=3, seed=5, data_seed=data_seed),
    )
    trainer.train()
    seen = [row for window in trainer.windows for micro_batch in window for row in micro_batch]
    orders = expected_orders(11, data_seed, 5, 3)
    assert seen == [row for order in orders for row in order]
    assert [len(window[0]) for window in trainer.windows] == [4, 4, 3] * 3


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


def test_log_lines_and_history(capsys):
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
    assert metrics["train_samples_per_second"] == pytest.approx(
        7 * 4 / metrics["train_runtime"], rel=0.01
    )


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
