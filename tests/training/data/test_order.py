"""--group_by_length against transformers' own function."""

import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler as TheirSampler

from glmkern.training.data.order import LengthGroupedSampler, create_sampler
from tests.training.children import random_rows
from tests.training.stand_in import Recorder, StandIn, arguments, simple_rows


@pytest.mark.parametrize("count, per_step", [(1, 1), (7, 4), (100, 3), (413, 2), (1300, 5)])
def test_the_order_is_that_of_transformers(count, per_step):
    lengths = [len(row.input_ids) for row in random_rows(count, 40, seed=count)]
    ours = LengthGroupedSampler(lengths, per_step, torch.Generator().manual_seed(count))
    theirs = TheirSampler(per_step, lengths=lengths, generator=torch.Generator().manual_seed(count))
    for _ in range(3):
        order = list(ours)
        assert order == list(theirs)
        assert sorted(order) == list(range(count)) and len(ours) == count
        assert lengths[order[0]] == max(lengths)


def test_the_flag_reaches_the_run():
    rows = [simple_rows(1, length=3 + i % 5)[0] for i in range(40)]
    trainer = Recorder(
        StandIn(),
        rows,
        arguments(
            group_by_length=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            data_seed=9,
        ),
    )
    trainer.train()
    seen = [row for window in trainer.windows for micro_batch in window for row in micro_batch]
    theirs = TheirSampler(
        4, lengths=[len(row.input_ids) for row in rows], generator=torch.Generator().manual_seed(9)
    )
    assert seen == list(theirs)


def test_the_seed_decides_without_a_data_seed():
    rows, flags = random_rows(20, 9), arguments(group_by_length=True)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(list(create_sampler(rows, flags)))
    assert orders[0] == orders[1] != orders[2]
