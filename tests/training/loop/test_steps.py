"""How many steps a run takes, and which rows each has."""

import math

import pytest
import torch

from glmkern.chatglm import ChatGLM
from glmkern.checkpoint import expected_shapes
from glmkern.model.config import ChatGLMConfig
from glmkern.training.loop.steps import StepPlan
from glmkern.training.loop.trainer import Trainer
from tests.training.stand_in import Recorder, StandIn, arguments, simple_rows


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
