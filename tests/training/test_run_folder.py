"""What a run leaves in its output folder, and that nothing of it is ever half-written."""

import json
import random

import numpy
import pytest
import torch

from glmkern.training.run_folder import RunFolder
from glmkern.training.trainer import Trainer
from tests.training.stand_in import OFFICIAL, StandIn, arguments, simple_rows


def saved(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


CHECKPOINT_FILES = {"pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                    "trainer_state.json", "resume.json"}


def train_into(folder, rows=None, model=None, save_total_limit=None, **flags):
    trainer = Trainer(model or StandIn(), rows or simple_rows(12),
                      arguments(per_device_train_batch_size=4, learning_rate=0.1,
                                **{"max_steps": 6, "save_steps": 2, **flags}),
                      folder=RunFolder(folder, save_total_limit))
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
    assert torch.equal(prefix[OFFICIAL + "embedding.weight"],
                       trainer.model.scores)
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
        "best_metric", "best_model_checkpoint", "epoch", "global_step", "is_hyper_param_search",
        "is_local_process_zero", "is_world_process_zero", "log_history", "max_steps",
        "num_train_epochs", "total_flos", "trial_name", "trial_params"}
    assert trainer.state.total_flos == 0  # the stand-in is all embedding


def test_results_are_merged(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_results("eval", {"eval_loss": 1.5, "epoch": 1.0})
    folder.write_results("train", {"train_loss": 2.5, "epoch": 2.0})
    text = (tmp_path / "train_results.json").read_text()
    assert text == '{\n    "epoch": 2.0,\n    "train_loss": 2.5\n}'
    assert json.loads((tmp_path / "all_results.json").read_text()) == {
        "eval_loss": 1.5, "train_loss": 2.5, "epoch": 2.0}


@pytest.mark.parametrize("flags, expected", [
    ({"save_steps": 4}, {4}),
    ({"save_steps": 0.5}, {3, 6}),
    ({"save_steps": -1}, set()),
    ({"save_strategy": "no"}, set()),
    ({"save_strategy": "epoch"}, {3, 6}),
    ({"save_steps": 1, "save_total_limit": 2}, {5, 6}),
    ({"save_steps": 2, "save_total_limit": 1}, {6}),
])
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
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().split("\n")
             if line]
    assert [line["current_steps"] for line in lines] == [2, 4, 6]
    assert {line["total_steps"] for line in lines} == {6}
    assert [line["percentage"] for line in lines] == [33.33, 66.67, 100.0]
    assert [line["total_tokens"] for line in lines] == [32, 64, 96]
    assert [line["loss"] for line in lines] == [
        log["loss"] for log in trainer.state.log_history[:-1]]
    assert lines[-1]["remaining_time"] == "0:00:00"
    assert lines[0].keys() == {
        "current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time",
        "remaining_time", "throughput", "total_tokens", "ram_allocated"}


def test_a_checkpoint_that_cannot_be_finished_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.write_checkpoint(3, fail)
    assert saved(tmp_path) == set()
