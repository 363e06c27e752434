"""All that needs a GPU, in one command: build, tests, memory checks, benchmarks.

    make gpu [OUT=folder]    or: python3 -m bench.gpu [--out folder] [--only step ...]

Uses the Python it runs in and what is installed there, fetches nothing, and builds for the GPU that
is there. Writes gpu.json, gpu.md and gpu.log to the folder (default bench/results) after every
step, so that a run cut short keeps its results so far. Exit code 2 without a GPU, 1 where a step
failed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
BENCHES = (
    "rms_norm",
    "bias_dropout",
    "rope",
    "swiglu",
    "prefix_attention",
    "quant_linear",
    "linear_cross_entropy",
    "step",
)
ROUNDS = 11  # of the benchmarks
TOTAL_SECONDS = 580
# A step is asked to end so long before its limit: pytest then prints the failures it has.
GRACE_SECONDS = 20
# Names of tests, as pytest -k takes them: what runs on the GPU, and of that every op's kernels once
# at small sizes, as compute-sanitizer slows a kernel by ten to a hundred.
ON_GPU = "triton or cuda or gpu"
SANITIZED = "(triton or cuda) and (touches_nothing_outside or same_bits or no_rows)"


class Step(NamedTuple):
    """One child process; `seconds` is its time limit, and TOTAL_SECONDS that of all together."""

    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = {}


def steps(json_folder: Path) -> Iterator[Step]:
    """In the order in which they run. A benchmark's rows go to `json_folder`."""
    python = sys.executable
    others = sorted(
        str(path.relative_to(ROOT)) for path in ROOT.glob("tests/*/test_*_on_triton.py")
    )
    pytest = [python, "-m", "pytest", "-q", "--tb=short"]
    yield Step(
        "build",
        [python, "setup.py", "-q", "build_ext", "--inplace"],
        200,
        {"GLMKERN_BUILD": "cuda"},
    )
    # Most of the time goes into compiling kernels, which several processes do at once.
    options = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    options += ["--timeout", "120"] if importlib.util.find_spec("pytest_timeout") else []
    yield Step("tests", [*pytest, *options, "tests/gpu", "tests/ops", *others, "-k", ON_GPU], 240)
    for name in BENCHES:
        yield Step(
            f"bench {name}",
            [
                python,
                "-m",
                f"bench.bench_{name}",
                "--device",
                "cuda",
                "--rounds",
                str(ROUNDS),
                "--json",
                str(json_folder / f"{name}.json"),
            ],
            120,
        )
    if checker := find_sanitizer():
        # Libraries probe the driver with calls that fail, which are no memory errors.
        memcheck = [
            checker,
            "--tool",
            "memcheck",
            "--report-api-errors",
            "no",
            "--error-exitcode",
            "1",
        ]
        yield Step(
            "memory check",
            [*memcheck, *pytest, "tests/ops", "-x", "-k", SANITIZED],
            100,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"torch is not installed in {sys.executable}"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def run_step(step: Step, log, seconds_left: float) -> dict:
    """Runs it, its output to the screen and to `log`; what the report says of it."""
    limit = int(min(step.seconds, seconds_left))
    print(f"== {step.name}", file=log, flush=True)
    print(f"== {step.name}", flush=True)
    if limit < 1:
        return {"step": step.name, "outcome": "no time was left", "seconds": 0, "last_line": ""}
    start = time.perf_counter()
    child = subprocess.Popen(
        step.command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
    )
    last = ""
    with time_limit(child, limit) as late:
        for line in child.stdout:
            log.write(line)
            sys.stdout.write(line)
            last = line.strip() or last
        code = child.wait()
    seconds = round(time.perf_counter() - start, 1)
    outcome = (
        f"stopped after {limit} s" if late else "passed" if code == 0 else f"failed with {code}"
    )
    log.flush()
    return {"step": step.name, "outcome": outcome, "seconds": seconds, "last_line": last}


@contextmanager
def time_limit(child: subprocess.Popen, seconds: float) -> Iterator[list]:
    """Interrupts the child and all that it started shortly before that time, and kills them when it
    has passed; the list yielded is then not empty."""
    late = []

    def send(number: signal.Signals):
        late.append(number)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    grace = min(GRACE_SECONDS, seconds / 2)
    timers = [
        threading.Timer(seconds - grace, send, [signal.SIGINT]),
        threading.Timer(seconds, send, [signal.SIGKILL]),
    ]
    for timer in timers:
        timer.start()
    try:
        yield late
    finally:
        for timer in timers:
            timer.cancel()


def add_benches(report: dict, folder: Path) -> None:
    """The runs that benchmarks have left in `folder`; one that was stopped may have left half."""
    for path in folder.glob("*.json"):
        with suppress(json.JSONDecodeError):
            report["benches"][path.stem] = json.loads(path.read_text())["cuda"]


def as_markdown(report: dict) -> str:
    from bench.harness import run_as_markdown

    described = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    text = (
        f"# On a GPU\n\nMade by `make gpu`. {described}\n\n| step | outcome | seconds | |\n"
        "|---|---|---|---|\n"
    )
    text += "".join(
        f"| {s['step']} | {s['outcome']} | {s['seconds']} | {s['last_line'][:90]} |\n"
        for s in report["steps"]
    )
    for name, run in report["benches"].items():
        text += f"\n## {name}\n\n{run_as_markdown(run)}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the three files")
    parser.add_argument("--only", nargs="*", help="steps by name, for work on one of them")
    args = parser.parse_args()
    if reason := why_no_gpu():
        print(f"make gpu needs a GPU: {reason}", file=sys.stderr)
        return 2
    from bench.roofline import machine

    # What a shell runs in the background ignores it, and so would the steps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine("cuda"), "steps": [], "benches": {}}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, (args.out / "gpu.log").open("w") as log:
        for step in steps(Path(folder)):
            if args.only and step.name not in args.only:
                continue
            left = TOTAL_SECONDS - (time.perf_counter() - start)
            report["steps"].append(run_step(step, log, left))
            add_benches(report, Path(folder))
            (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "gpu.md").write_text(as_markdown(report))
    return int(any(step["outcome"] != "passed" for step in report["steps"]))


if __name__ == "__main__":
    sys.exit(main())
