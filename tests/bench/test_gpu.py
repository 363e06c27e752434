"""`make gpu`: what can be known of it without a GPU. It is rehearsed on the CPU at small sizes and
with planted faults, each of which the report must name."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import jobs, stages, sweep
from bench.gpu.jobs import Deadline, Job, run_job
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


def test_says_so_without_torch(tmp_path):
    """Nothing of torch is imported before."""
    blocked = "import sys; sys.argv[1:] = ['--out', 'out']"
    program = f"{blocked}; import runpy; runpy.run_module('bench.gpu', run_name='__main__')"
    child = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert child.returncode == 2
    assert child.stderr == f"make gpu needs a GPU: torch is not installed in {sys.executable}\n"


def test_a_wrong_stage_is_named(capsys):
    with (
        mock.patch.object(sys, "argv", ["gpu", "--rehearse", "--only", "smoke", "fire"]),
        pytest.raises(SystemExit),
    ):
        gpu.main()
    assert "there is no stage fire; they are build, smoke, times" in capsys.readouterr().err


def test_every_job_finds_its_files(tmp_path):
    context = stages.Context(tmp_path, tmp_path, "cuda")
    names = []
    for stage in stages.STAGES:
        assert 0 < stage.job_seconds <= stage.seconds
        for job in stage.jobs(context):
            names.append(job.name)
            for argument in job.command:
                if argument.startswith("tests/"):
                    assert (REPOSITORY / argument).exists(), argument
            if job.command[1:2] == ["-m"] and job.command[2] != "pytest":
                assert (REPOSITORY / f"{job.command[2].replace('.', '/')}.py").exists()
    assert len(set(names)) == len(names)
    for mode in ("judge", "time"):
        assert {f"{mode} {op} triton" for op in EVERY_OP} <= set(names)
    benches = {path.stem.removeprefix("bench_") for path in REPOSITORY.glob("bench/bench_*.py")}
    assert set(stages.BENCHES) == benches - {"train", "full_size", "generate", "step"}


def test_the_memory_check_covers_every_op():
    """And no kernel for CPUs, which takes time and is another check's."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-k", stages.SANITIZED]
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
def test_a_job(program, seconds, outcome):
    """One that is stopped hears of it first, and takes what it started along."""
    result, text = run_job(Job("try", [sys.executable, "-c", program]), Deadline(seconds))
    assert result.outcome == outcome
    assert result.seconds < 30
    hello = "hello\n" if seconds else ""
    assert (result.last_line, text) == (hello.strip(), hello)


def test_a_job_without_a_program():
    result, _ = run_job(Job("try", ["/nowhere/ncu"]), Deadline(9))
    assert result.outcome.startswith("did not start: [Errno 2]")


def test_a_deadline_within_another():
    assert Deadline(50, Deadline(5)).left() < 6
    assert Deadline(5, Deadline(50)).left() < 6


def rehearse(tmp_path: Path, only: str, stage_list: Sequence[stages.Stage]) -> tuple[int, dict]:
    """The exit code and what gpu.json has."""
    arguments = ["gpu", "--rehearse", "--out", str(tmp_path), "--only", only]
    with (
        mock.patch.object(stages, "STAGES", stage_list),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict("os.environ", TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
    ):
        code = gpu.main()
    report = tmp_path / "gpu.json"
    return code, json.loads(report.read_text()) if report.is_file() else {}


def judges(*ops: str, faults: str = "", rows: str | None = None) -> stages.Stage:
    """A stage that judges these ops with faults planted."""

    def make(context: stages.Context) -> list[Job]:
        found = []
        for job in stages.smoke(context):
            if job.name.split()[1] in ops and job.name.endswith("triton"):
                command = list(job.command)
                if faults:
                    command[2:2] = ["tests.bench.planted", faults]
                if rows:
                    command[command.index(str(context.rows))] = rows
                found.append(Job(job.name, command))
        return found

    seconds = 20 if "hangs" in faults else 120
    return stages.Stage("smoke", 2, seconds, seconds, True, make)


def test_a_rehearsal_without_faults(tmp_path):
    code, report = rehearse(tmp_path, "smoke", [judges("swiglu")])
    assert code == 0
    assert {row["verdict"] for row in report["rows"]} == {"right"}
    assert {row["dtype"] for row in report["rows"]} == {"float16", "bfloat16", "float32"}
    assert {row["pass"] for row in report["rows"]} == {"forward", "backward"}
    text = (tmp_path / "gpu.md").read_text()
    assert "| swiglu | triton | backward | right |" in text
    assert "**" not in text


def test_planted_faults_are_named(tmp_path):
    """An op that raises, one that is wrong in one element and one that hangs; another is right."""
    stage_list = [
        judges("swiglu", "rms_norm", "bias_dropout", faults="swiglu:raises,rms_norm:wrong"),
        judges("rope", faults="rope:hangs"),
    ]
    code, report = rehearse(tmp_path, "smoke", stage_list)
    assert code == 1
    verdicts = {}
    for row in report["rows"]:
        verdicts.setdefault(row["op"], set()).add(row["verdict"])
    assert verdicts["bias_dropout_add"] == {"right"}
    assert verdicts["swiglu"] == {"crashed"}
    assert "wrong" in verdicts["rms_norm"]
    outcomes = {job["job"]: job for job in report["jobs"]}
    assert outcomes["judge rope triton"]["outcome"] == "stopped after 20 s"
    hung = next(row for row in report["rows"] if row["op"] == "rope")
    assert (hung["verdict"], hung["shape"]) == ("crashed", "rope of 16 tokens")
    text = (tmp_path / "gpu.md").read_text()
    assert "RuntimeError: CUDA error: an illegal memory access" in text
    assert "| rms_norm | triton | forward | **wrong** |" in text
    assert "| judge rope triton |  |  | **stopped after 20 s** |" in text
    assert "| float16 rope of 16 tokens | crashed | - | stopped: it hung, or took" in text


def test_a_full_disk(tmp_path, capsys):
    """In a job it fails that job; in the report's own files it is said, and the run goes on."""
    code, report = rehearse(tmp_path, "smoke", [judges("swiglu", rows="/dev/full")])
    assert code == 1
    assert "No space left on device" in report["jobs"][0]["last_line"]
    assert "No space left on device" in (tmp_path / "gpu.md").read_text()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    two = [Job(name, [sys.executable, "-c", "print(1)"]) for name in ("first", "second")]
    stage = stages.Stage("smoke", 1, 60, 60, True, lambda context: two)
    with mock.patch.object(Path, "write_text", no_space):
        code, report = rehearse(tmp_path / "full", "smoke", [stage])
    assert (code, report) == (0, {})
    said = capsys.readouterr()
    assert said.err.count("could not write to") == 2
    assert "first: passed" in said.out
    assert "second: passed" in said.out


def test_a_rehearsal_of_the_model(tmp_path):
    """Its verdicts, and a line for each of its measurements."""
    parts = ("judge graphs", "judge step", "model decode")

    def make(context: stages.Context) -> list[Job]:
        return [job for job in stages.model(context) if job.name in parts]

    code, report = rehearse(tmp_path, "model", [stages.Stage("model", 2, 120, 120, True, make)])
    assert code == 0, report["jobs"]
    assert [job["outcome"] for job in report["jobs"]] == ["passed"] * 3
    what = [row["what"] for row in report["rows"]]
    assert sum(x.startswith("graphs beside single steps") for x in what) == 4
    assert {"step", "decoding 1 rows", "profile of decoding 16 rows"} <= set(what)


@pytest.mark.parametrize("name", stages.SWEEPS)
def test_sweeps_begin_with_our_own_tile(name):
    """Without the kernels, which take the interpreter too long."""
    with (
        mock.patch.object(sweep, "_seconds", lambda case, direction, device: 1e-6),
        mock.patch.object(sweep, "_call", lambda case, direction: lambda: None),
    ):
        rows = list(sweep.run(name, sweep.REHEARSAL, "cpu"))
    by_shape = {}
    for row in rows:
        by_shape.setdefault(row["shape"], []).append(row)
    for of_shape in by_shape.values():
        assert of_shape[0]["ours"]
        assert sum(row["ours"] for row in of_shape) == 1
        assert len({row["tile"] for row in of_shape}) == len(of_shape) >= 5
    assert {row["us"] for row in rows} == {1.0}


def test_one_process_at_a_time_and_not_for_long(tmp_path):
    """One that hangs in its turn is ended by the system, and the next one's turn comes."""
    program = (
        "import sys, time, bench.gpu.rows as rows; from pathlib import Path; "
        "rows.LONGEST_TURN = 2\n"
        f"with rows.alone(Path({str(tmp_path / 'lock')!r})):\n"
        "    print('in'); sys.stdout.flush(); time.sleep(float(sys.argv[1]))\n"
        "print('out')"
    )
    done = []
    both = [Job(name, [sys.executable, "-c", program, name]) for name in ("600", "0")]
    jobs.run_all(both, 2, 100, Deadline(100), lambda text: None, done.append)
    outcomes = {outcome.job: outcome for outcome in done}
    assert outcomes["600"].outcome == "failed with -14"
    assert outcomes["600"].last_line == "in"
    assert (outcomes["0"].outcome, outcomes["0"].last_line) == ("passed", "out")


def test_an_interrupt_reaches_the_jobs(tmp_path):
    """Also where the shell that started the run ignores it."""
    program = "import signal; assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN"
    job = Job("try", [sys.executable, "-c", program])
    stage = stages.Stage("smoke", 1, 60, 60, True, lambda context: [job])
    with ignored_interrupts():
        code, _ = rehearse(tmp_path, "smoke", [stage])
    assert code == 0


@contextlib.contextmanager
def ignored_interrupts():
    import signal

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_jobs_run_side_by_side():
    """As many as there are workers."""
    done = []
    sleep = [Job(str(i), [sys.executable, "-c", "import time; time.sleep(1)"]) for i in range(4)]
    deadline = Deadline(60)
    jobs.run_all(sleep, 4, 60, deadline, lambda text: None, done.append)
    assert {outcome.outcome for outcome in done} == {"passed"}
    assert 60 - deadline.left() < 3.5
