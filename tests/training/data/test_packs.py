"""The micro-batches of a step in packs: weights, names for dropout, token budget."""

import pytest

from glmkern.training.data.packs import AUTO_TOKENS, labelled_tokens, pack_step, token_budget
from glmkern.training.data.rows import Row
from tests.training.stand_in import IGNORED


def test_a_labelled_token_weighs_one_over_its_micro_batch():
    rows = [
        Row([1, 1, 1], [IGNORED, 2, 2]),
        Row([1, 1, 1, 1], [IGNORED, IGNORED, IGNORED, 2]),
        Row([1, 1], [2, 2]),
    ]
    assert [labelled_tokens(row) for row in rows] == [2, 1, 1]
    (pack,) = pack_step(rows, [[0, 1], [2]], budget=100)
    weights = pack.batch.token_weight[pack.batch.labels != IGNORED]
    assert weights.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])
    assert pack.batch.sequence_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "budget, expected",
    [
        (0, [[0, 1], [2, 3], [4]]),
        (8, [[0], [1, 2], [3], [4]]),
        (10, [[0, 1], [2, 3], [4]]),
        (1, [[0], [1], [2], [3], [4]]),
        (1000, [[0, 1, 2, 3, 4]]),
    ],
)
def test_packs(budget, expected):
    rows = [Row([1] * n, [IGNORED] + [2] * (n - 1)) for n in (5, 4, 3, 7, 9)]
    packs = pack_step(rows, [[0, 1], [2, 3], [4]], budget)
    assert [pack.rows for pack in packs] == expected
    assert [pack.tokens for pack in packs] == [
        sum(len(rows[i].input_ids) for i in group) for group in expected
    ]


def test_token_budget():
    assert (token_budget("auto"), token_budget("0"), token_budget("777")) == (AUTO_TOKENS, 0, 777)
