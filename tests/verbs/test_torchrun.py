"""Several processes through the command line and the real launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmkern import cli
from glmkern.checkpoint import read_prefix
from tests.official import REPOSITORY, command
from tests.training import children

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def test_torchrun(flags, tmp_path):
    one = {**flags, "output_dir": tmp_path / "one", "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    assert cli.main(command(one)) == 0
    two = {**one, "output_dir": tmp_path / "two"}
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", "-m", "glmkern", *command(two)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("***** Running training *****") == 1
    assert "  Total train batch size (w. parallel, distributed & accumulation) = 4\n" in done.stdout
    assert "  Number of processes = 2, which share the steps above\n" in done.stdout
    ends = [
        read_prefix(tmp_path / name / "checkpoint-4")["embedding.weight"] for name in ("one", "two")
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    assert [log["loss"] for log in logs[0][:-1]] == pytest.approx(
        [log["loss"] for log in logs[1][:-1]], abs=1.5e-4
    )


def test_torchrun_with_a_rank_that_is_killed(flags, tmp_path):
    endless = {**flags, "max_steps": 100_000, "save_steps": 100}
    launcher = subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node=2", "-m", "glmkern", *command(endless)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        children.wait_for((tmp_path / "out" / "checkpoint-100").exists)
        worker = process_of_rank(1, launcher.pid)
        # The base's pages are those of the file, and so the same for all ranks.
        assert "model.safetensors" in Path(f"/proc/{worker}/maps").read_text()
        os.kill(worker, signal.SIGKILL)
        errors = launcher.communicate(timeout=60)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "glmkern: rank 1 died without a message" in errors
    assert f"last good checkpoint: {tmp_path}/out/checkpoint-" in errors


def process_of_rank(rank: int, launcher: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        parent = path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
        variables = (
            path.joinpath("environ").read_bytes().split(b"\0") if (int(parent) == launcher) else ()
        )
        if f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"rank {rank} is not there")
