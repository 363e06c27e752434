"""What a run leaves in its output folder, and that nothing of it is ever half-written."""

import json
import os
import random
from pathlib import Path

import numpy
import pytest
import torch

from glmkern.errors import InputError
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training.stand_in import OFFICIAL, StandIn, arguments, simple_rows


def saved(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


CHECKPOINT_FILES = {
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "resume.json",
}


def train_into(folder, rows=None, model=None, save_total_limit=None, **flags):
    trainer = Trainer(
        model or StandIn(),
        rows or simple_rows(12),
        arguments(
            per_device_train_batch_size=4,
            learning_rate=0.1,
            **{"max_steps": 6, "save_steps": 2, **flags},
        ),
        folder=RunFolder(folder, save_total_limit),
    )
    trainer.train()
    return trainer


def test_checkpoints(tmp_path):
    trainer = train_into(tmp_path / "out", logging_steps=1)
    folder = tmp_path / "out"
    assert saved(folder) == {"checkpoint-2", "checkpoint-4", "checkpoint-6", "trainer_log.jsonl"}
    last = folder / "checkpoint-6"
    assert saved(last) == CHECKPOINT_FILES

    def load(name):
        return torch.load(last / name, weights_only=True)

    prefix = load("pytorch_model.bin")
    assert prefix.keys() == {OFFICIAL + "embedding.weight"}
    assert torch.equal(prefix[OFFICIAL + "embedding.weight"], trainer.model.scores)
    trainer.optimizer.load_state_dict(load("optimizer.pt"))
    assert load("scheduler.pt")["last_epoch"] == 6
    torch.random.set_rng_state(load("rng_state.pth")["cpu"])
    random.setstate(load("rng_state.pth")["python"])
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and state["epoch"] == 2.0
    assert [log["step"] for log in state["log_history"]] == [1, 2, 3, 4, 5, 6]


def test_rng_state_is_that_of_the_moment(tmp_path):
    train_into(tmp_path, max_steps=2)
    state = torch.load(tmp_path / "checkpoint-2" / "rng_state.pth", weights_only=True)
    now = (torch.rand(2), random.random())
    torch.random.set_rng_state(state["cpu"])
    random.setstate(state["python"])
    assert torch.equal(torch.rand(2), now[0]) and random.random() == now[1]
    numpy.random.set_state(state["numpy"])
    again = numpy.random.rand()
    numpy.random.set_state(state["numpy"])
    assert numpy.random.rand() == again


def test_trainer_state_has_the_official_form(tmp_path):
    trainer = train_into(tmp_path)
    text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    state = json.loads(text)
    assert text == json.dumps(state, indent=2, sort_keys=True) + "\n"
    assert state.keys() == {
        "best_metric",
        "best_model_checkpoint",
        "epoch",
        "global_step",
        "is_hyper_param_search",
        "is_local_process_zero",
        "is_world_process_zero",
        "log_history",
        "max_steps",
        "num_train_epochs",
        "total_flos",
        "trial_name",
        "trial_params",
    }
    assert trainer.state.total_flos == 0  # the stand-in is all embedding


def test_results_are_merged(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_results("eval", {"eval_loss": 1.5, "epoch": 1.0})
    folder.write_results("train", {"train_loss": 2.5, "epoch": 2.0})
    text = (tmp_path / "train_results.json").read_text()
    assert text == '{\n    "epoch": 2.0,\n    "train_loss": 2.5\n}'
    assert json.loads((tmp_path / "all_results.json").read_text()) == {
        "eval_loss": 1.5,
        "train_loss": 2.5,
        "epoch": 2.0,
    }


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"save_steps": 4}, {4}),
        ({"save_steps": 0.5}, {3, 6}),
        ({"save_steps": -1}, set()),
        ({"save_strategy": "no"}, set()),
        ({"save_strategy": "epoch"}, {3, 6}),
        ({"save_steps": 1, "save_total_limit": 2}, {5, 6}),
        ({"save_steps": 2, "save_total_limit": 1}, {6}),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, flags, expected):
    train_into(tmp_path, **flags)
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == expected


def test_a_checkpoint_replaces_an_older_one_of_its_name(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "stale").write_text("")
    train_into(tmp_path, max_steps=2)
    assert saved(tmp_path / "checkpoint-2") == CHECKPOINT_FILES


def test_trainer_log(tmp_path):
    trainer = train_into(tmp_path, logging_steps=2)
    lines = [
        json.loads(line)
        for line in (tmp_path / "trainer_log.jsonl").read_text().split("\n")
        if line
    ]
    assert [line["current_steps"] for line in lines] == [2, 4, 6]
    assert {line["total_steps"] for line in lines} == {6}
    assert [line["percentage"] for line in lines] == [33.33, 66.67, 100.0]
    assert [line["total_tokens"] for line in lines] == [32, 64, 96]
    assert [line["loss"] for line in lines] == [
        log["loss"] for log in trainer.state.log_history[:-1]
    ]
    assert lines[-1]["remaining_time"] == "0:00:00"
    assert lines[0].keys() == {
        "current_steps",
        "total_steps",
        "loss",
        "lr",
        "epoch",
        "percentage",
        "elapsed_time",
        "remaining_time",
        "throughput",
        "total_tokens",
        "ram_allocated",
    }


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.write_checkpoint(3, fail)
    assert saved(tmp_path) == set()


# Evaluation, the best checkpoint, and what is deleted


def train_with_losses(folder, losses, metric=None, **flags):
    """Six steps; the n-th evaluation returns losses[n]."""
    values = iter(losses)
    order = []
    trainer = Trainer(
        StandIn(),
        simple_rows(12),
        arguments(
            **{
                "per_device_train_batch_size": 4,
                "max_steps": 6,
                "save_steps": 1,
                "logging_steps": 1,
                "evaluation_strategy": "steps",
                "eval_steps": 1,
                **flags,
            }
        ),
        folder=RunFolder(folder, flags.get("save_total_limit")),
        hooks=Hooks(
            evaluate=lambda: order.append("evaluate") or {metric or "eval_loss": next(values)},
            on_save=lambda path, step: order.append(path.name),
            on_step=lambda step: order.append(step),
        ),
    )
    write_log = trainer._write_log
    trainer._write_log = lambda logs: order.append(next(iter(logs))) or write_log(logs)
    trainer.train()
    return trainer, order


def steps_kept(folder) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}


def test_log_evaluate_save(tmp_path):
    trainer, order = train_with_losses(tmp_path, [3.0, 2.0], max_steps=2)
    assert order == [
        1,
        "loss",
        "evaluate",
        "eval_loss",
        "checkpoint-1",
        2,
        "loss",
        "evaluate",
        "eval_loss",
        "checkpoint-2",
    ]
    logs = trainer.state.log_history
    assert [log["step"] for log in logs] == [1, 1, 2, 2, 2]
    assert [log.get("eval_loss") for log in logs] == [None, 3.0, None, 2.0, None]
    assert logs[1]["epoch"] == 0.33
    assert trainer.model.training
    # Without a metric that was asked for there is no best, as in transformers.
    assert trainer.state.best_metric is None


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"eval_steps": 4}, [4]),
        ({"eval_steps": None, "logging_steps": 2}, [2, 4, 6]),
        ({"eval_steps": 0.5}, [3, 6]),
        ({"eval_steps": 2, "eval_delay": 3}, [4, 6]),
        ({"evaluation_strategy": "epoch"}, [3, 6]),
        ({"evaluation_strategy": "epoch", "eval_delay": 2}, [6]),
        ({"evaluation_strategy": "no"}, []),
    ],
)
def test_when_it_evaluates(tmp_path, flags, expected):
    trainer, _ = train_with_losses(tmp_path, range(9), **flags)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == expected


@pytest.mark.parametrize(
    "flags, losses, best, kept",
    [
        ({}, [5, 3, 4, 2, 6, 7], 4, {1, 2, 3, 4, 5, 6}),
        ({"save_total_limit": 2}, [5, 1, 4, 2, 6, 7], 2, {2, 6}),
        ({"save_total_limit": 1}, [5, 1, 4, 2, 6, 7], 2, {2, 6}),
        ({"save_total_limit": 3}, [5, 1, 4, 2, 6, 7], 2, {2, 5, 6}),
        ({"greater_is_better": True}, [5, 3, 4, 2, 6, 1], 5, {1, 2, 3, 4, 5, 6}),
        ({"save_steps": 2}, [1, 5, 0, 2, 0, 3], 4, {2, 4, 6}),  # only what is saved can be the best
        ({}, [5, 5, 5, 5, 5, 5], 1, {1, 2, 3, 4, 5, 6}),
    ],
)
def test_the_best_checkpoint(tmp_path, flags, losses, best, kept):
    trainer, _ = train_with_losses(tmp_path, losses, load_best_model_at_end=True, **flags)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.state.best_metric == losses[best - 1]
    assert steps_kept(tmp_path) == kept
    stored = torch.load(tmp_path / f"checkpoint-{best}" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(trainer.model.scores, stored[OFFICIAL + "embedding.weight"])
    state = json.loads((tmp_path / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")


@pytest.mark.parametrize("name", ["bleu-4", "eval_bleu-4"])
def test_another_metric_is_better_when_greater(tmp_path, name):
    trainer, _ = train_with_losses(
        tmp_path, [1, 3, 2, 0, 3, 1], metric="eval_bleu-4", metric_for_best_model=name
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    # Not asked for: the last prefix stays.
    assert not torch.equal(
        trainer.model.scores,
        torch.load(tmp_path / "checkpoint-2" / "pytorch_model.bin")[OFFICIAL + "embedding.weight"],
    )


def test_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="eval_rouge-l is none of the metrics .*(eval_loss)"):
        train_with_losses(tmp_path, [1, 2], metric_for_best_model="rouge-l")


def test_evaluation_needs_something_to_evaluate():
    with pytest.raises(ValueError, match="--evaluation_strategy steps needs something"):
        Trainer(StandIn(), simple_rows(1), arguments(evaluation_strategy="steps"))


def test_litter_of_a_killed_run_is_removed(tmp_path):
    litter = [tmp_path / ".checkpoint-4.0a1b2c3d.tmp", tmp_path / ".0123456789abcdef.tmp"]
    litter[0].mkdir()
    (litter[0] / "optimizer.pt").write_text("half")
    litter[1].write_text("half")
    (tmp_path / ".mine.tmp").write_text("")
    train_into(tmp_path, max_steps=1)
    assert saved(tmp_path) == {".mine.tmp"}


def test_the_log_is_shortened(tmp_path):
    lines = [json.dumps({"current_steps": step}) + "\n" for step in (2, 4, 4, 6)]
    (tmp_path / "trainer_log.jsonl").write_text("".join(lines) + '{"current_st')
    RunFolder(tmp_path).shorten_log(2)
    assert (tmp_path / "trainer_log.jsonl").read_text() == "".join(lines[:2])
    RunFolder(tmp_path / "none").shorten_log(4)


# A disk that is full, or not the user's


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    cannot = f"cannot write {tmp_path}/.*checkpoint-3 .*; free some space or choose a folder"
    with pytest.raises(InputError, match=cannot):
        RunFolder(tmp_path / "absent").write_checkpoint(3, lambda folder: None)

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=cannot):
        RunFolder(tmp_path).write_checkpoint(3, lambda folder: None)
    assert saved(tmp_path) == set()


def test_files_of_a_killed_run_that_cannot_be_changed(tmp_path, monkeypatch):
    (tmp_path / "trainer_log.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot write .*/trainer_log.jsonl .Is a directory"):
        RunFolder(tmp_path).shorten_log(2)
    (tmp_path / ".0123456789abcdef.tmp").write_text("")

    def refuse(path, missing_ok):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError, match=f"cannot write {tmp_path} .Permission denied"):
        RunFolder(tmp_path).remove_temporary_files()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device is Linux's")
def test_a_log_on_a_full_disk_stops_the_run_in_one_sentence(tmp_path):
    (tmp_path / "trainer_log.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot write .*/trainer_log.jsonl .No space left on"):
        train_into(tmp_path, logging_steps=1)
