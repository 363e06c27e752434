"""`make gpu`: what can be known of it without a GPU."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import gpu
from tests.backends import EVERY_OP
from tests.conftest import REPOSITORY


def test_says_so_without_a_gpu(capsys, tmp_path):
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(sys, "argv", ["gpu", "--out", str(tmp_path / "out")]),
    ):
        assert gpu.main() == 2
    assert capsys.readouterr().err == "make gpu needs a GPU: torch sees no GPU\n"
    assert not (tmp_path / "out").exists()


def test_every_step_finds_its_files(tmp_path):
    steps = list(gpu.steps(tmp_path))
    assert steps[-1].name == "memory check" or not gpu.find_sanitizer()
    assert sum(step.seconds for step in steps if "bench" not in step.name) <= gpu.TOTAL_SECONDS
    for step in steps:
        for argument in step.command:
            if argument.endswith(".py") or argument.startswith("tests/"):
                assert (REPOSITORY / argument).exists(), argument
            if argument.startswith("bench."):
                assert (REPOSITORY / f"{argument.replace('.', '/')}.py").exists(), argument
    benches = {path.stem.removeprefix("bench_") for path in REPOSITORY.glob("bench/bench_*.py")}
    assert set(gpu.BENCHES) == benches - {"train", "full_size", "generate"}


def test_the_memory_check_covers_every_op():
    """And no kernel for CPUs, which takes time and is another check's."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-k", gpu.SANITIZED]
    done = subprocess.run(
        [*command, "tests/ops"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    collected = [line for line in done.stdout.splitlines() if "::" in line]
    for op in EVERY_OP:
        tests = [line.split("::")[1] for line in collected if f"/test_{op}" in line]
        assert any("touches_nothing_outside[triton" in name for name in tests), op
        assert any("same_bits" in name for name in tests), op
    assert not [line for line in collected if "[cpu" in line or "[reference" in line]


SLEEPING_CHILD = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import signal, time; '
                  'signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)'])
signal.signal(signal.SIGINT, lambda *_: print('hello'))
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "seconds", "outcome"),
    [
        ("print('hello')", 60, "passed"),
        ("print('hello'); raise SystemExit(3)", 60, "failed with 3"),
        (SLEEPING_CHILD, 2, "stopped after 2 s"),
        ("print('never')", 0, "no time was left"),
    ],
)
def test_a_step(program, seconds, outcome):
    """One that is stopped hears of it first, and takes what it started along."""
    log = io.StringIO()
    step = gpu.Step("try", [sys.executable, "-c", program], 60)
    result = gpu.run_step(step, log, seconds_left=seconds)
    assert result["outcome"] == outcome
    assert result["seconds"] < 30
    hello = "hello\n" if seconds else ""
    assert result["last_line"] == hello.strip()
    assert log.getvalue() == f"== try\n{hello}"


def test_half_a_file(tmp_path):
    report = {"benches": {}}
    (tmp_path / "rope.json").write_text('{"cuda": {"machine"')
    (tmp_path / "swiglu.json").write_text('{"cuda": {"rows": []}}')
    gpu.add_benches(report, tmp_path)
    assert report == {"benches": {"swiglu": {"rows": []}}}


def test_the_three_files(tmp_path, request):
    """With a step that leaves a benchmark's rows, and hears interrupts although we do not."""
    row = dict(
        name="copy",
        implementation="triton",
        shape="1 x 2",
        dtype="float32",
        median_ms=0.5,
        fastest_ms=0.4,
        gb_per_s=10.0,
        fraction=0.9,
        vs_peer=None,
    )
    run = {"cuda": {"machine": {"gpu": "a chip"}, "rounds": 3, "rows": [row]}, "cpu": None}

    def steps(folder: Path):
        write = (
            "import signal; assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN;"
            f"open({str(folder / 'rms_norm.json')!r}, 'w').write({json.dumps(run)!r})"
        )
        yield gpu.Step("bench rms_norm", [sys.executable, "-c", write], 60)
        yield gpu.Step("not asked for", [sys.executable, "-c", "raise SystemExit(1)"], 60)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with (
        mock.patch.object(gpu, "why_no_gpu", lambda: None),
        mock.patch.object(gpu, "steps", steps),
        mock.patch("bench.roofline.machine", lambda device: {"gpu": "a chip"}),
        mock.patch.object(sys, "argv", ["gpu", "--out", str(tmp_path), "--only", "bench rms_norm"]),
    ):
        assert gpu.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["benches"]["rms_norm"]["rows"] == [row]
    table = (tmp_path / "gpu.md").read_text()
    assert "| bench rms_norm | passed |" in table
    assert "| copy | triton | 1 x 2 | float32 | 0.500 | 10.0 | 0.90 | - |" in table
