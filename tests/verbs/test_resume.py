"""Stopping and going on through the command line, in processes of their own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmkern import cli
from tests.official import REPOSITORY, command, prefix, refused
from tests.training.checkpoints import contents, without
from tests.training.children import wait_for

# Long enough to be stopped, however late the signal is sent.
LONG = {"max_steps": 150, "save_steps": 30, "logging_steps": 10, "save_total_limit": 3}


def start(flags: dict[str, object]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "glmkern", *command(flags)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_interrupted_and_finished(flags, tmp_path):
    """A kill, then a SIGTERM, then the command that was printed."""
    flags = {**flags, **LONG}
    assert cli.main(command({**flags, "output_dir": tmp_path / "whole"})) == 0
    out = tmp_path / "out"
    killed = start(flags)
    wait_for((out / "checkpoint-30").exists)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (out / "checkpoint-120").exists()
    killed.stderr.close()

    del flags["overwrite_output_dir"]
    stopped = start({**flags, "resume_from_checkpoint": "auto"})
    wait_for((out / "checkpoint-60").exists)
    stopped.terminate()
    message = stopped.communicate()[1].splitlines()[-1]
    assert stopped.returncode == 128 + signal.SIGTERM
    step = int(message.split("glmkern: stopped after step ")[1].split(";")[0])
    assert f"; saved in {out}/checkpoint-{step}; go on with: {sys.executable} -m glmkern" in message
    printed = message.split("go on with: ")[1]
    done = subprocess.run(printed, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"  Continuing after step {step}, from {out}/checkpoint-{step}\n" in done.stdout

    whole, parts = contents(tmp_path / "whole"), contents(out)
    names = {name for name in whole if "checkpoint-1" in name or "/" not in name}
    for name in names - {"train_results.json", "all_results.json"}:
        if not name.endswith("glmkern.json"):
            assert parts[name] == whole[name], name
    results = [
        json.loads((folder / "train_results.json").read_text())
        for folder in (tmp_path / "whole", out)
    ]
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    assert without(results[0], times) == without(results[1], times)


def test_a_fresh_start_where_there_is_no_checkpoint(flags, tmp_path, capsys):
    del flags["overwrite_output_dir"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trainer_log.jsonl").write_text("")  # a run killed before its first save
    assert cli.main(command({**flags, "resume_from_checkpoint": "auto"})) == 0
    out = capsys.readouterr().out
    assert f"no checkpoint in {tmp_path}/out to resume from: the run starts afresh" in out
    assert (tmp_path / "out" / "checkpoint-4").is_dir()


def test_a_longer_run_at_a_constant_rate(flags, tmp_path):
    flags = {**flags, "lr_scheduler_type": "constant"}
    assert cli.main(command({**flags, "output_dir": tmp_path / "whole", "max_steps": 6})) == 0
    assert cli.main(command(flags)) == 0
    resumed = {
        **flags,
        "max_steps": 6,
        "output_dir": tmp_path / "elsewhere",
        "resume_from_checkpoint": tmp_path / "out" / "checkpoint-4",
    }
    assert cli.main(command(resumed)) == 0
    assert prefix(tmp_path / "elsewhere" / "checkpoint-6").equal(
        prefix(tmp_path / "whole" / "checkpoint-6")
    )


def test_another_folder_and_the_dtype_that_auto_chose(flags, rows, tmp_path):
    """The best checkpoint stays in the first folder."""
    flags = {
        **flags,
        "save_steps": 2,
        "eval_steps": 2,
        "evaluation_strategy": "steps",
        "load_best_model_at_end": True,
        "validation_file": rows,
        "no_cuda": True,
    }
    assert cli.main(command(flags)) == 0
    first, second = tmp_path / "out" / "checkpoint-2", tmp_path / "elsewhere"
    judged = [
        json.loads(line)["eval_loss"]
        for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
        if "eval_loss" in line
    ]
    state = first / "trainer_state.json"  # as if step 2 had been much better than step 4 will be
    state.write_text(state.read_text().replace(f'"best_metric": {judged[0]}', '"best_metric": -1'))
    assert (
        cli.main(
            command(
                {
                    **flags,
                    "output_dir": second,
                    "model_dtype": "float32",
                    "resume_from_checkpoint": first,
                }
            )
        )
        == 0
    )
    end = json.loads((second / "trainer_state.json").read_text())
    assert end["best_model_checkpoint"] == str(first) and end["best_metric"] == -1
    assert (second / "train_results.json").exists()


def test_the_tokens_of_a_pack_stay_those_of_the_first_part(flags, tmp_path):
    """However much memory is free by then."""
    saved = [tmp_path / "out" / f"checkpoint-{step}" / "glmkern.json" for step in (2, 4)]
    assert cli.main(command({**flags, "save_steps": 2})) == 0
    kept = json.loads(saved[0].read_text())
    assert kept["tokens_per_pack"] == "2048"  # chosen by auto
    saved[0].write_text(json.dumps(kept | {"tokens_per_pack": "50"}))
    assert (
        cli.main(command({**flags, "save_steps": 2, "resume_from_checkpoint": saved[0].parent}))
        == 0
    )
    assert json.loads(saved[1].read_text())["tokens_per_pack"] == "50"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": 7}, "--seed is 7, but "),
        ({"max_steps": 8}, "--max_steps is 8, but "),
        (
            {"ptuning_checkpoint": "checkpoint"},
            "--resume_from_checkpoint goes on with a stopped run",
        ),
        ({"resume_from_checkpoint": "absent"}, "--resume_from_checkpoint absent is not a folder"),
        ({"train_file": "other"}, "comes from a run over other rows"),
    ],
)
def test_what_cannot_be_resumed(flags, tmp_path, rows, capsys, changes, words):
    assert cli.main(command(flags)) == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    before = contents(tmp_path / "out")
    other = tmp_path / "other.json"
    other.write_text(rows.read_text().replace("的", "之"))
    places = {"checkpoint": checkpoint, "other": other}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    capsys.readouterr()
    wrong = {**flags, "resume_from_checkpoint": checkpoint, **changes}
    assert words in refused(command(wrong), capsys)
    assert contents(tmp_path / "out") == before


def test_a_warm_start_can_be_resumed_with_its_own_command(flags, tmp_path, capsys):
    """The printed command is the first one and --resume_from_checkpoint auto."""
    assert cli.main(command({**flags, "output_dir": tmp_path / "first"})) == 0
    warm = {**flags, "ptuning_checkpoint": tmp_path / "first" / "checkpoint-4", "seed": 3}
    assert cli.main(command({**warm, "output_dir": tmp_path / "whole"})) == 0
    first = tmp_path / "first" / "checkpoint-4"
    explained = (
        f"a new run from the prefix in {first}, with a new optimiser and schedule, from "
        f"step 0; --resume_from_checkpoint {first} would go on with the run that saved it"
    )
    assert explained in capsys.readouterr().out
    assert cli.main(command(warm)) == 0
    capsys.readouterr()
    Path(tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    assert cli.main(command({**warm, "resume_from_checkpoint": "auto"})) == 0
    assert "a new run" not in capsys.readouterr().out
    ends = [contents(tmp_path / name)["checkpoint-4/optimizer.pt"] for name in ("whole", "out")]
    assert ends[0] == ends[1]
