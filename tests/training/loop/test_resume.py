"""A run that is stopped, however, and taken up again ends with the bits of one that was not."""

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from glmkern.errors import InputError, Interrupted
from glmkern.training.loop.hooks import Hooks
from glmkern.training.loop.resume import find_checkpoint, resume_command
from glmkern.training.loop.trainer import Trainer
from glmkern.training.output.run_folder import RunFolder
from tests.training import children
from tests.training.checkpoints import contents, make_checkpoint
from tests.training.children import random_rows
from tests.training.stand_in import StandIn, arguments, make_runs_last, simple_rows


@pytest.mark.parametrize(
    "flags",
    [
        {"save_steps": 1, "save_total_limit": 2, "metric_for_best_model": "loss"},
        {
            "save_steps": 3,
            "group_by_length": True,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
    ],
    ids=["every step", "every third step"],
)
def test_killed_at_random_moments(tmp_path, flags):
    """Ten SIGKILLs each."""
    children.run(children.train, tmp_path / "whole", flags)
    started = time.monotonic()
    children.run(children.train, tmp_path / "again", flags)
    duration = time.monotonic() - started
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "again") == whole and "trainer_state.json" in whole
    kills, folder = 0, tmp_path / "0"
    while kills < 10 or not (folder / "trainer_state.json").exists():
        child = children.start(children.train, folder, flags)
        child.join(random.uniform(0, duration) if kills < 10 else None)
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
            assert contents(folder) == whole
            if kills < 10:
                folder = tmp_path / str(kills)


def train_stand_in(folder: Path) -> None:
    """Two steps and two checkpoints, the first of which is deleted."""
    trainer = Trainer(
        StandIn(),
        simple_rows(6),
        arguments(
            max_steps=2,
            save_steps=1,
            logging_steps=1,
            learning_rate=0.1,
            per_device_train_batch_size=2,
        ),
        folder=RunFolder(folder, save_total_limit=1),
    )
    trainer.train(find_checkpoint("auto", folder))
    trainer.folder.write_state(trainer.state)


def die_at_every_file_operation(folder: Path) -> None:
    """Forks a run for every k, which ends without a word before its k-th file operation."""
    operations = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
    train_stand_in(folder / "whole")
    whole = contents(folder / "whole")
    assert "checkpoint-1" not in whole and "checkpoint-2" in whole
    number = died = 0
    while died == number:
        number += 1
        pid = os.fork()
        if pid == 0:
            left = number

            def count(event: str, args: tuple) -> None:
                nonlocal left
                if event in operations or event == "open" and str(args[0]).startswith(str(folder)):
                    left -= 1
                    if left == 0:
                        os._exit(9)

            sys.addaudithook(count)
            train_stand_in(folder / str(number))
            os._exit(0)
        died += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        train_stand_in(folder / str(number))
        assert contents(folder / str(number)) == whole, number
        shutil.rmtree(folder / str(number))
    assert died > 80


def test_killed_at_every_file_operation(tmp_path):
    children.run(die_at_every_file_operation, tmp_path)


def run_in_parts(folder: Path, stops: list[int], model, flags: dict) -> Trainer:
    """Trains with a SIGTERM after each of the steps `stops`."""
    for stop in [*stops, None]:
        args = children.run_arguments(folder, **flags)
        trainer = Trainer(
            model(),
            random_rows(13, 12),
            args,
            folder=RunFolder(folder),
            hooks=Hooks(
                evaluate=children.draws,
                on_step=lambda step, stop=stop: step == stop and os.kill(os.getpid(), 15),
            ),
        )
        try:
            trainer.train(find_checkpoint("auto", folder))
        except Interrupted:
            assert trainer.state.global_step == stop
    trainer.folder.write_state(trainer.state)
    return trainer


@pytest.mark.parametrize(
    "flags",
    [
        {
            "logging_strategy": "epoch",
            "save_strategy": "epoch",
            "evaluation_strategy": "epoch",
            "gradient_accumulation_steps": 2,
            "max_steps": -1,
            "num_train_epochs": 2.5,
        },
        {"logging_strategy": "epoch", "gradient_accumulation_steps": 100, "max_steps": 6},
        {
            "optim": "adamw_torch",
            "weight_decay": 0.1,
            "lr_scheduler_type": "polynomial",
            "data_seed": 8,
            "dataloader_drop_last": True,
            "save_strategy": "no",
        },
    ],
    ids=["epochs", "short epochs", "other flags"],
)
def test_stopped_by_a_signal(tmp_path, flags):
    run_in_parts(tmp_path / "whole", [], children.model, flags)
    run_in_parts(tmp_path / "parts", [1, 3, 4], children.model, flags)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    # The signals leave checkpoints of their own.
    assert {name: parts[name] for name in whole} == whole
    assert {"checkpoint-1", "checkpoint-3", "checkpoint-4"} <= parts.keys()


@pytest.mark.parametrize(
    "flags",
    [
        {"logging_strategy": "epoch", "evaluation_strategy": "epoch", "save_steps": 1},
        {"logging_steps": 1, "eval_steps": 1, "save_steps": 2, "save_total_limit": None},
        {"logging_steps": 5, "save_steps": 1, "gradient_accumulation_steps": 7},
    ],
)
def test_from_every_checkpoint(tmp_path, flags):
    """As after a kill at any time between two saves: the logs have lines of later steps."""
    run_in_parts(tmp_path / "whole", [], children.model, flags)
    whole = contents(tmp_path / "whole")
    steps = sorted(
        int(path.name.split("-")[1]) for path in (tmp_path / "whole").glob("checkpoint-*")
    )
    assert len(steps) > 5
    for place, step in enumerate(steps):
        again = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", again)
        for later in steps[place + 1 :]:
            shutil.rmtree(again / f"checkpoint-{later}")
        run_in_parts(again, [], children.model, flags)
        assert contents(again) == whole


def test_the_log_of_an_older_run_is_not_continued(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text('{"current_steps": 1}\n' * 5)
    run_in_parts(tmp_path, [3], children.model, {"logging_steps": 4, "logging_first_step": False})
    lines = map(json.loads, (tmp_path / "trainer_log.jsonl").read_text().splitlines())
    assert [line["current_steps"] for line in lines if "loss" in line] == [4, 8, 12]


def test_the_loss_scale_goes_on(tmp_path):
    flags = {"learning_rate": 0.1, "max_steps": 8, "save_steps": 8, "evaluation_strategy": "no"}
    ends = []
    for name, stops in (("whole", []), ("parts", [2, 5])):
        trainer = run_in_parts(tmp_path / name, stops, lambda: children.model(torch.float16), flags)
        ends.append(
            (trainer.loss_scale.state_dict(), contents(tmp_path / name)["checkpoint-8/scaler.pt"])
        )
    assert ends[0] == ends[1] and ends[0][0]["_growth_tracker"] == 8


def test_a_finished_run_only_writes_its_results(tmp_path, capsys):
    trainer = run_in_parts(tmp_path, [], children.model, {"save_steps": 12})
    before = contents(tmp_path)
    again = run_in_parts(tmp_path, [], children.model, {"save_steps": 12})
    assert "Continuing after step 12, from " in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert again.state.log_history[-1]["train_loss"] == trainer.state.log_history[-1]["train_loss"]
    assert again.state.log_history[-1]["train_steps_per_second"] == 0


def test_speed_is_that_of_the_last_part(tmp_path, monkeypatch):
    make_runs_last(0.25, monkeypatch)
    trainer = run_in_parts(tmp_path, [9], children.model, {})
    last = trainer.state.log_history[-1]
    assert last["train_runtime"] == 0.25
    assert last["train_steps_per_second"] == 3 / 0.25
    assert last["train_samples_per_second"] == 3 * 6 / 0.25


def test_a_smaller_pack_may_go_on(tmp_path):
    """What a lack of memory asks for; the end differs by rounding alone."""
    whole = run_in_parts(tmp_path / "whole", [], children.model, {})
    run_in_parts(tmp_path / "parts", [5], children.model, {})
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12", ignore_errors=True)
    again = run_in_parts(tmp_path / "parts", [], children.model, {"tokens_per_pack": "9"})
    torch.testing.assert_close(
        again.gradient.parameters[0], whole.gradient.parameters[0], rtol=0, atol=1e-4
    )


# Which checkpoint


@pytest.mark.parametrize("word", ["auto", "True", "true"])
def test_auto_takes_the_newest_complete_checkpoint(tmp_path, word):
    assert find_checkpoint(word, tmp_path) is None
    assert find_checkpoint(word, tmp_path / "absent") is None
    assert find_checkpoint(None, tmp_path) is None
    for step in (30, 2, 4):  # 30 is of an earlier run into the same folder
        make_checkpoint(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}" / "trainer_state.json", (1e9 - step, 1e9 - step))
    (tmp_path / "checkpoint-99").mkdir()
    os.utime(tmp_path / "checkpoint-4" / "trainer_state.json")
    assert find_checkpoint(word, tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert find_checkpoint(word, tmp_path) == tmp_path / "checkpoint-2"


def test_a_folder_that_is_no_checkpoint(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "out", 2)
    assert find_checkpoint(str(checkpoint), tmp_path) == checkpoint
    with pytest.raises(InputError, match="is not a folder; name a checkpoint-N folder, or auto"):
        find_checkpoint(str(tmp_path / "absent"), tmp_path)
    with pytest.raises(InputError, match="holds checkpoints but is none; name one of them"):
        find_checkpoint(str(tmp_path / "out"), tmp_path)
    (checkpoint / "resume.json").unlink()
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(
        InputError,
        match="lacks optimizer.pt, resume.json, .*--ptuning_checkpoint "
        "starts a new run from its prefix",
    ):
        find_checkpoint(str(checkpoint), tmp_path)


# The command to go on with


@pytest.mark.parametrize(
    "program, argv, environment, expected",
    [
        (
            "/x/glmkern/__main__.py",
            ["--do_train", "--output_dir", "a b"],
            {},
            "/py -m glmkern --do_train --output_dir 'a b' --resume_from_checkpoint auto",
        ),
        (
            "/usr/bin/glmkern",
            ["train", "--seed=3", "--resume_from_checkpoint", "x/checkpoint-2"],
            {},
            "glmkern train --seed=3 --resume_from_checkpoint auto",
        ),
        (
            "/usr/bin/glmkern",
            ["flags.json", "--resume-from-checkpoint=auto"],
            {},
            "glmkern flags.json --resume_from_checkpoint auto",
        ),
        (
            "/x/glmkern/__main__.py",
            ["--do_train"],
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "torchrun ... --nproc-per-node 2 -m glmkern --do_train --resume_from_checkpoint auto",
        ),
        (
            "/x/glmkern/__main__.py",
            ["--do_train"],
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --standalone --nproc-per-node 2 -m glmkern --do_train "
            "--resume_from_checkpoint auto",
        ),
    ],
)
def test_resume_command(monkeypatch, program, argv, environment, expected):
    monkeypatch.setattr(sys, "orig_argv", ["/py", program])
    monkeypatch.setattr(sys, "argv", [program])
    assert resume_command(argv, environment) == expected
