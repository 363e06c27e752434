"""The scores against the official record."""

import json
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmkern.training.evaluation.scores import Scores
from glmkern.training.flags.packages import SCORES


@pytest.fixture(scope="module")
def recorded(golden) -> dict:
    return json.loads((golden / "metrics.json").read_text(encoding="utf-8"))


def test_official_scores(recorded):
    scores = Scores()
    pairs = recorded["pairs"] + [each for each in recorded["edge"] if "rouge_error" not in each]
    assert len(pairs) == 12
    for pair in pairs:
        assert scores.add(pair["pred"], pair["label"]) == {name: pair[name] for name in SCORES}
    means = {name: fmean(pair[name] for pair in pairs) for name in SCORES}
    assert scores.means() == pytest.approx(means, rel=1e-12)
    assert (scores.count, scores.empty) == (12, 0)


def test_what_ends_the_official_run_scores_zero_and_counts(recorded):
    scores = Scores()
    scores.add("好", "好的")
    fatal = [each for each in recorded["edge"] if "rouge_error" in each]
    assert len(fatal) == 2
    for pair in [*fatal, {"pred": " \n\u3000", "label": "好"}]:
        assert scores.add(pair["pred"], pair["label"]) == dict.fromkeys(SCORES, 0)
    assert (scores.count, scores.empty) == (4, 3)
    assert scores.means()["bleu-4"] == 13.0065 / 4


@settings(deadline=None)  # the first word loads jieba's dictionary
@given(
    st.text("你好的。，！ \n\t\u3000a.b?…”’1\x1f\u200b\ufffd<", max_size=9),
    st.text("你好的。，！ \n\t\u3000a.b?…”’1\x1f\u200b\ufffd<", max_size=9),
)
def test_every_answer_has_a_score(answer, reference):
    scores = Scores().add(answer, reference)
    assert all(0 <= value <= 100 for value in scores.values())
    if answer == reference and answer.strip():
        assert scores["rouge-1"] == scores["rouge-l"] == 100
