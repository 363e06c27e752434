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
from glmkern.training.arguments import Arguments, DataTrainingArguments, ModelArguments
from glmkern.training.resume import check_same_run, find_checkpoint, fingerprint, resume_command
from glmkern.training.run_folder import RunFolder
from glmkern.training.trainer import Trainer
from tests.training import children
from tests.training.children import random_rows
from tests.training.stand_in import StandIn, arguments, simple_rows

TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
LOG_TIMES = {"elapsed_time", "remaining_time", "throughput", "ram_allocated", "vram_allocated"}


def without(record: dict, names: set[str]) -> dict:
    return {name: value for name, value in record.items() if name not in names}


def trainer_state(path: Path) -> dict:
    """trainer_state.json but for times, and the folder in the name of the best checkpoint."""
    state = json.loads(path.read_text())
    state["log_history"] = [without(log, TIMES) for log in state["log_history"]]
    state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
    return state


def plain(value):
    """Tensors as bytes, so that == compares every bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def contents(folder: Path) -> dict[str, object]:
    """Everything a run left, times left out."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".pt", ".pth", ".bin"):
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.name == "trainer_state.json":
            found[name] = trainer_state(path)
        elif path.suffix == ".jsonl":
            found[name] = [without(json.loads(line), LOG_TIMES)
                           for line in path.read_text().splitlines()]
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found


@pytest.mark.parametrize("flags", [
    {"save_steps": 1, "save_total_limit": 2, "metric_for_best_model": "loss"},
    {"save_steps": 3, "group_by_length": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
], ids=["every step", "every third step"])
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
    trainer = Trainer(StandIn(), simple_rows(6), arguments(
        max_steps=2, save_steps=1, logging_steps=1, learning_rate=0.1,
        per_device_train_batch_size=2), folder=RunFolder(folder, save_total_limit=1))
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
            model(), random_rows(13, 12), args, folder=RunFolder(folder), evaluate=children.draws,
            on_step=lambda step, stop=stop: step == stop and os.kill(os.getpid(), 15))
        try:
            trainer.train(find_checkpoint("auto", folder))
        except Interrupted:
            assert trainer.state.global_step == stop
    trainer.folder.write_state(trainer.state)
    return trainer


@pytest.mark.parametrize("flags", [
    {"logging_strategy": "epoch", "save_strategy": "epoch", "evaluation_strategy": "epoch",
     "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2.5},
    {"logging_strategy": "epoch", "gradient_accumulation_steps": 100, "max_steps": 6},
    {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "polynomial",
     "data_seed": 8, "dataloader_drop_last": True, "save_strategy": "no"},
], ids=["epochs", "short epochs", "other flags"])
def test_stopped_by_a_signal(tmp_path, flags):
    run_in_parts(tmp_path / "whole", [], children.model, flags)
    run_in_parts(tmp_path / "parts", [1, 3, 4], children.model, flags)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    # The signals leave checkpoints of their own.
    assert {name: parts[name] for name in whole} == whole
    assert {"checkpoint-1", "checkpoint-3", "checkpoint-4"} <= parts.keys()


@pytest.mark.parametrize("flags", [
    {"logging_strategy": "epoch", "evaluation_strategy": "epoch", "save_steps": 1},
    {"logging_steps": 1, "eval_steps": 1, "save_steps": 2, "save_total_limit": None},
    {"logging_steps": 5, "save_steps": 1, "gradient_accumulation_steps": 7},
])
def test_from_every_checkpoint(tmp_path, flags):
    """As after a kill at any time between two saves: the logs have lines of later steps."""
    run_in_parts(tmp_path / "whole", [], children.model, flags)
    whole = contents(tmp_path / "whole")
    steps = sorted(int(path.name.split("-")[1])
                   for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert len(steps) > 5
    for place, step in enumerate(steps):
        again = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", again)
        for later in steps[place + 1:]:
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
        trainer = run_in_parts(tmp_path / name, stops,
                               lambda: children.model(torch.float16), flags)
        ends.append((trainer.loss_scale.state_dict(), contents(tmp_path / name)["checkpoint-8/"
                                                                                "scaler.pt"]))
    assert ends[0] == ends[1] and ends[0][0]["_growth_tracker"] == 8


def test_a_finished_run_only_writes_its_results(tmp_path, capsys):
    trainer = run_in_parts(tmp_path, [], children.model, {"save_steps": 12})
    before = contents(tmp_path)
    again = run_in_parts(tmp_path, [], children.model, {"save_steps": 12})
    assert "Continuing after step 12, from " in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert again.state.log_history[-1]["train_loss"] == trainer.state.log_history[-1]["train_loss"]
    assert again.state.log_history[-1]["train_steps_per_second"] == 0


def test_speed_is_that_of_the_last_part(tmp_path):
    trainer = run_in_parts(tmp_path, [9], children.model, {})
    last = trainer.state.log_history[-1]
    assert last["train_steps_per_second"] == pytest.approx(3 / last["train_runtime"], rel=0.1)
    assert last["train_samples_per_second"] == pytest.approx(3 * 6 / last["train_runtime"], rel=0.1)


def test_a_smaller_pack_may_go_on(tmp_path):
    """What a lack of memory asks for; the end differs by rounding alone."""
    whole = run_in_parts(tmp_path / "whole", [], children.model, {})
    run_in_parts(tmp_path / "parts", [5], children.model, {})
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12", ignore_errors=True)
    again = run_in_parts(tmp_path / "parts", [], children.model, {"tokens_per_pack": "9"})
    torch.testing.assert_close(again.gradient.parameters[0], whole.gradient.parameters[0],
                               rtol=0, atol=1e-4)


# Which checkpoint

def make_checkpoint(folder: Path, step: int, **flags) -> Path:
    train_one(folder, step)
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "glmkern.json").write_text(json.dumps(every_flag(**flags)))
    return checkpoint


def train_one(folder: Path, step: int) -> None:
    Trainer(StandIn(), simple_rows(6), arguments(max_steps=step, save_steps=step),
            folder=RunFolder(folder)).train()


def every_flag(**flags) -> dict:
    sections = (ModelArguments(), DataTrainingArguments(), arguments())
    return {**Arguments(*sections).to_dict(), **flags}


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
    with pytest.raises(InputError, match="lacks optimizer.pt, resume.json, .*--ptuning_checkpoint "
                                         "starts a new run from its prefix"):
        find_checkpoint(str(checkpoint), tmp_path)


# Which run

@pytest.mark.parametrize("earlier, now, words", [
    ({}, {"seed": 7}, "--seed is 7, but .* comes from a run with 42; pass --seed 42, or start a"),
    ({"data_seed": None}, {"data_seed": 7}, "--data_seed is 7, .* with None; leave it out, or"),
    ({"pre_seq_len": 128}, {"pre_seq_len": 64}, "--pre_seq_len is 64"),
    ({}, {"per_device_train_batch_size": 3}, "--per_device_train_batch_size is 3"),
    ({}, {"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps is 3"),
    ({}, {"prefix_projection": True}, "--prefix_projection is True"),
    ({}, {"optim": "adamw_torch"}, "--optim is adamw_torch, .* pass --optim adamw_hf"),
    ({}, {"group_by_length": True}, "--group_by_length is True"),
    ({}, {"tf32": True}, "--tf32 is True, .* leave it out"),
    ({"max_steps": 10}, {"max_steps": 20}, "--max_steps is 20"),
    ({}, {"num_train_epochs": 5.0}, "--num_train_epochs is 5.0"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
     {"lr_scheduler_type": "constant", "warmup_ratio": 0.1, "max_steps": 9}, "--max_steps is 9"),
    ({}, {"ptuning_checkpoint": "old"}, "goes on with a stopped run, prefix, optimiser and "
                                        "schedule included, .* starts a new run from a saved"),
])
def test_another_run_is_refused(tmp_path, earlier, now, words):
    checkpoint = make_checkpoint(tmp_path, 2, **earlier)
    check_same_run(checkpoint, every_flag(**earlier))
    with pytest.raises(InputError, match=words) as error:
        check_same_run(checkpoint, every_flag(**now))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("earlier, now", [
    ({}, {"output_dir": "elsewhere", "logging_steps": 7, "save_total_limit": 1, "save_steps": 9,
          "overwrite_output_dir": True, "tokens_per_pack": "0", "recompute": "layer"}),
    ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant", "max_steps": 9}),
    ({"ptuning_checkpoint": "old"}, {"ptuning_checkpoint": "old"}),
    ({"ptuning_checkpoint": "old"}, {}),
    ({"model_dtype": "auto"}, {"model_dtype": "float32"}),  # what auto was, resume.json knows
])
def test_what_may_change(tmp_path, earlier, now):
    check_same_run(make_checkpoint(tmp_path, 2, **earlier), every_flag(**now))


def test_a_position_of_another_version(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    position = json.loads((checkpoint / "resume.json").read_text())
    (checkpoint / "resume.json").write_text(json.dumps({**position, "moon": 1}))
    with pytest.raises(InputError, match="resume.json is of another version"):
        resume_stand_in(checkpoint)


def resume_stand_in(checkpoint: Path, rows=None, model=None, **flags) -> None:
    Trainer(model or StandIn(), rows or simple_rows(6), arguments(**{"max_steps": 3, **flags})
            ).train(checkpoint)


def test_other_rows_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    resume_stand_in(checkpoint)
    for rows in (simple_rows(7), simple_rows(6)[::-1], simple_rows(6, length=5)):
        with pytest.raises(InputError, match="comes from a run over other rows"):
            resume_stand_in(checkpoint, rows)
    labels, ids = random_rows(2, 9), random_rows(2, 9)
    assert fingerprint(labels) == fingerprint(ids)
    ids[1].input_ids[2] += 1
    labels[1].labels[2] += 1
    assert len({fingerprint(rows) for rows in (labels, ids, random_rows(2, 9))}) == 3


def test_other_models_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(InputError, match=f"comes from a run in float32 and this one is in "
                                             f"{str(dtype)[6:]}; pass --model_dtype float32"):
            resume_stand_in(checkpoint, model=StandIn(dtype))
    with pytest.raises(InputError, match=r"embedding.weight of the prefix in .* is \[1, 8\] and "
                                         r"in this run \[5, 144\]"):
        resume_stand_in(checkpoint, model=children.model())
    with pytest.raises(InputError, match="has 2 steps, more than the 1 of this run"):
        resume_stand_in(checkpoint, max_steps=1)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "resume.json",
                                  "trainer_state.json", "pytorch_model.bin"])
def test_damaged_checkpoints(tmp_path, name):
    checkpoint = make_checkpoint(tmp_path, 2)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        resume_stand_in(checkpoint)


def rewrite(path: Path, value) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path)


@pytest.mark.parametrize("name, value", [
    ("optimizer.pt", []), ("optimizer.pt", {}), ("optimizer.pt", {"state": 1, "param_groups": [1]}),
    ("scheduler.pt", []), ("scheduler.pt", {}), ("scheduler.pt", torch.ones(2)),
    ("rng_state.pth", []), ("rng_state.pth", {"python": 1}), ("rng_state.pth", {"python": (3, ())}),
    ("rng_state.pth", {"python": (3, (1,) * 625, None), "cpu": torch.ones(2)}),
    ("resume.json", []), ("resume.json", 3), ("trainer_state.json", []),
    ("trainer_state.json", {}), ("trainer_state.json", {"global_step": "2"}),
    ("trainer_state.json", {"global_step": 2, "log_history": {}}),
    ("trainer_state.json", {"global_step": 2, "best_model_checkpoint": 2})])
def test_files_of_another_shape(tmp_path, name, value):
    checkpoint = make_checkpoint(tmp_path, 2)
    rewrite(checkpoint / name, value)
    with pytest.raises(InputError, match=name) as error:
        resume_stand_in(checkpoint)
    assert str(tmp_path) in str(error.value) and "another checkpoint" in str(error.value)


def test_a_place_and_moments_of_another_shape(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 2)
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    position = json.loads((checkpoint / "resume.json").read_text())
    rewrite(checkpoint / "resume.json", {**position, "micro_batches": [2]})
    with pytest.raises(InputError, match="resume.json is damaged"):
        resume_stand_in(checkpoint)
    rewrite(checkpoint / "resume.json", position)
    moments["state"][0]["exp_avg"] = torch.zeros(3)
    rewrite(checkpoint / "optimizer.pt", moments)
    with pytest.raises(InputError, match="optimizer.pt is damaged"):
        resume_stand_in(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"tokens_per_pack": 3}', None])
def test_flags_that_are_none(tmp_path, content):
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / "glmkern.json").unlink()
    if content is not None:
        (checkpoint / "glmkern.json").write_text(content)
    with pytest.raises(InputError, match="glmkern.json"):
        check_same_run(find_checkpoint(str(checkpoint), tmp_path), every_flag())
    with pytest.raises(InputError, match="glmkern.json .*; resume from another checkpoint"):
        check_same_run(find_checkpoint("auto", tmp_path), every_flag())


def test_a_checkpoint_that_does_not_name_its_dtype(tmp_path):
    """As of older releases: only the loss scale tells float16 from the others."""
    checkpoint = make_checkpoint(tmp_path, 2)
    position = json.loads((checkpoint / "resume.json").read_text())
    assert position.pop("dtype") == "float32"
    rewrite(checkpoint / "resume.json", position)
    resume_stand_in(checkpoint)
    with pytest.raises(InputError, match="has no scaler.pt, which only a run in float16 saves, "
                                         "and this one is in float16; pass the --model_dtype"):
        resume_stand_in(checkpoint, model=StandIn(torch.float16))


# The best checkpoint

def train_for_the_best(folder: Path, losses: dict[int, float], resume_from: Path | None = None,
                       every: dict | None = None, **flags) -> Trainer:
    """Saves and evaluates in every step; `losses`: step to what its evaluation returns. Every
    checkpoint keeps the flags `every`."""
    args = arguments(**{"max_steps": max(losses), "save_steps": 1, "evaluation_strategy": "steps",
                        "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.1,
                        "lr_scheduler_type": "constant", **flags})
    kept = {**every_flag(), **vars(args), **(every or {})}
    trainer = Trainer(
        StandIn(), simple_rows(8), args, folder=RunFolder(folder, args.save_total_limit),
        flags=kept, evaluate=lambda: {"eval_loss": losses[trainer.state.global_step],
                                      "eval_bleu-4": 100 - losses[trainer.state.global_step]},
        write_companions=lambda path: rewrite(path / "glmkern.json", kept))
    trainer.train(resume_from)
    return trainer


def prefix_of(checkpoint: Path) -> torch.Tensor:
    saved, = torch.load(checkpoint / "pytorch_model.bin", weights_only=True).values()
    return saved


@pytest.mark.parametrize("limit", [None, 1])
def test_the_best_checkpoint_lies_in_the_folder_of_the_first_part(tmp_path, limit):
    first, second = tmp_path / "a", tmp_path / "b"
    train_for_the_best(first, {1: 3.0, 2: 1.0, 3: 2.0})
    train_for_the_best(second, {1: 7.0, 2: 0.5}, learning_rate=0.3)  # another run
    again = train_for_the_best(second, {4: 6.0, 5: 5.0}, first / "checkpoint-3",
                               save_total_limit=limit)
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
    again = train_for_the_best(Path("moved"), {4: 4.0, 5: 5.0}, Path("moved/checkpoint-3"),
                               save_total_limit=1)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")
    assert again.model.scores.equal(whole.model.scores)
    assert {path.name for path in Path("moved").glob("checkpoint-*")} == {
        "checkpoint-2", "checkpoint-5"}


def test_a_lost_best_checkpoint_stops_the_run_before_it_starts(tmp_path):
    train_for_the_best(tmp_path / "a", {1: 3.0, 2: 1.0, 3: 2.0})
    train_for_the_best(tmp_path / "b", {1: 7.0, 2: 0.5})
    shutil.rmtree(tmp_path / "a" / "checkpoint-2")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="would load .*/a/checkpoint-2, .* neither there nor at"):
        train_for_the_best(tmp_path / "b", {4: 4.0}, tmp_path / "a" / "checkpoint-3")
    assert contents(tmp_path) == before
    again = train_for_the_best(tmp_path / "b", {4: 4.0}, tmp_path / "a" / "checkpoint-3",
                               load_best_model_at_end=False)
    assert again.state.best_metric == 1.0


@pytest.mark.parametrize("flags, every, words", [
    ({"metric_for_best_model": "bleu-4"}, {}, "--metric_for_best_model was None and is bleu-4: "),
    ({"greater_is_better": True}, {}, "--greater_is_better was None and is True: "),
    ({}, {"validation_file": "other.json"}, "--validation_file was None and is other.json: "),
    ({}, {"max_eval_samples": 7}, "--max_eval_samples was None and is 7: "),
])
def test_a_best_by_another_measure_is_forgotten(tmp_path, capsys, flags, every, words):
    train_for_the_best(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0})
    capsys.readouterr()
    again = train_for_the_best(tmp_path, {4: 50.0, 5: 50.0}, tmp_path / "checkpoint-3", every,
                               **flags)
    assert words + (f"the best checkpoint so far, {tmp_path}/checkpoint-2 (1.0), does not count "
                    "any more\n") in capsys.readouterr().out
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert again.state.best_metric == 50.0
    assert again.model.scores.equal(prefix_of(tmp_path / "checkpoint-4"))


# The command to go on with

@pytest.mark.parametrize("program, argv, environment, expected", [
    ("/x/glmkern/__main__.py", ["--do_train", "--output_dir", "a b"], {},
     "/py -m glmkern --do_train --output_dir 'a b' --resume_from_checkpoint auto"),
    ("/usr/bin/glmkern", ["train", "--seed=3", "--resume_from_checkpoint", "x/checkpoint-2"], {},
     "glmkern train --seed=3 --resume_from_checkpoint auto"),
    ("/usr/bin/glmkern", ["flags.json", "--resume-from-checkpoint=auto"], {},
     "glmkern flags.json --resume_from_checkpoint auto"),
    ("/x/glmkern/__main__.py", ["--do_train"], {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
     "torchrun ... --nproc-per-node 2 -m glmkern --do_train --resume_from_checkpoint auto"),
    ("/x/glmkern/__main__.py", ["--do_train"], {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
     "torchrun --standalone --nproc-per-node 2 -m glmkern --do_train --resume_from_checkpoint "
     "auto"),
])
def test_resume_command(monkeypatch, program, argv, environment, expected):
    monkeypatch.setattr(sys, "orig_argv", ["/py", program])
    monkeypatch.setattr(sys, "argv", [program])
    assert resume_command(argv, environment) == expected
