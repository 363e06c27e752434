"""The best checkpoint of a run that is resumed, perhaps in another folder or by another measure."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from glmkern.errors import InputError
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training.checkpoints import contents, every_flag, rewrite
from tests.training.stand_in import StandIn, arguments, simple_rows


def train_for_the_best(
    folder: Path,
    losses: dict[int, float],
    resume_from: Path | None = None,
    every: dict | None = None,
    **flags,
) -> Trainer:
    """Saves and evaluates in every step; `losses`: step to what its evaluation returns. Every
    checkpoint keeps the flags `every`."""
    args = arguments(
        **{
            "max_steps": max(losses),
            "save_steps": 1,
            "evaluation_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            **flags,
        }
    )
    kept = {**every_flag(), **vars(args), **(every or {})}
    trainer = Trainer(
        StandIn(),
        simple_rows(8),
        args,
        folder=RunFolder(folder, args.save_total_limit),
        flags=kept,
        hooks=Hooks(
            evaluate=lambda: {
                "eval_loss": losses[trainer.state.global_step],
                "eval_bleu-4": 100 - losses[trainer.state.global_step],
            },
            write_companions=lambda path: rewrite(path / "glmkern.json", kept),
        ),
    )
    trainer.train(resume_from)
    return trainer


def prefix_of(checkpoint: Path) -> torch.Tensor:
    (saved,) = torch.load(checkpoint / "pytorch_model.bin", weights_only=True).values()
    return saved


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_checkpoint_lies_in_the_folder_of_the_first_part(tmp_path, limit):
    first, second = tmp_path / "a", tmp_path / "b"
    train_for_the_best(first, {1: 3.0, 2: 1.0, 3: 2.0})
    train_for_the_best(second, {1: 7.0, 2: 0.5}, learning_rate=0.3)  # another run
    again = train_for_the_best(
        second, {4: 6.0, 5: 5.0}, first / "checkpoint-3", save_total_limit=limit
    )
    assert again.state.best_model_checkpoint == str(first / "checkpoint-2")
    assert again.model.scores.equal(prefix_of(first / "checkpoint-2"))
    assert (second / "checkpoint-4").exists() == (limit is None)
    if limit is None:  # the third part, too, passes by the other run's checkpoint-2
        third = train_for_the_best(second, {6: 6.0}, second / "checkpoint-5")
        assert third.model.scores.equal(prefix_of(first / "checkpoint-2"))


def test_a_moved_folder_has_its_best_checkpoint_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    whole = train_for_the_best(Path("a"), losses)
    assert whole.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")
    os.rename("a", "moved")
    again = train_for_the_best(
        Path("moved"), {4: 4.0, 5: 5.0}, Path("moved/checkpoint-3"), save_total_limit=1
    )
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert again.model.scores.equal(whole.model.scores)
    assert {path.name for path in Path("moved").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-5",
    }


def test_a_lost_best_checkpoint_stops_the_run_before_it_starts(tmp_path):
    train_for_the_best(tmp_path / "a", {1: 3.0, 2: 1.0, 3: 2.0})
    train_for_the_best(tmp_path / "b", {1: 7.0, 2: 0.5})
    shutil.rmtree(tmp_path / "a" / "checkpoint-2")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="would load .*/a/checkpoint-2, .* neither there nor at"):
        train_for_the_best(tmp_path / "b", {4: 4.0}, tmp_path / "a" / "checkpoint-3")
    assert contents(tmp_path) == before
    again = train_for_the_best(
        tmp_path / "b", {4: 4.0}, tmp_path / "a" / "checkpoint-3", load_best_model_at_end=False
    )
    assert again.state.best_metric == 1.0


@pytest.mark.parametrize(
    "flags, every, words",
    [
        (
            {"metric_for_best_model": "bleu-4"},
            {},
            "--metric_for_best_model was None and is bleu-4: ",
        ),
        ({"greater_is_better": True}, {}, "--greater_is_better was None and is True: "),
        ({}, {"validation_file": "other.json"}, "--validation_file was None and is other.json: "),
        ({}, {"max_eval_samples": 7}, "--max_eval_samples was None and is 7: "),
    ],
)
def test_a_best_by_another_measure_is_forgotten(tmp_path, capsys, flags, every, words):
    train_for_the_best(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0})
    capsys.readouterr()
    again = train_for_the_best(
        tmp_path, {4: 50.0, 5: 50.0}, tmp_path / "checkpoint-3", every, **flags
    )
    assert (
        words
        + (f"the best checkpoint so far, {tmp_path}/checkpoint-2 (1.0), does not count any more\n")
        in capsys.readouterr().out
    )
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert again.state.best_metric == 50.0
    assert again.model.scores.equal(prefix_of(tmp_path / "checkpoint-4"))
