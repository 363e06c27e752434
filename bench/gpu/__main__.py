"""All that needs a GPU, in one command, in stages: the most telling comes first.

    make gpu [OUT=folder]    or: python3 -m bench.gpu [--out folder] [--only stage ...]
                                 [--deadline seconds]

Uses the Python it runs in and what is installed there, fetches nothing, and builds for the GPU that
is there. stages.py lists the stages and their limits; `--deadline` cuts from the end. Every op runs
in a process of its own. gpu.json and gpu.md (default folder bench/results) are written after every
job, so that a run cut short keeps its results so far; gpu.log has all output. Exit code 2 without a
GPU, 1 where something is wrong.
"""

import argparse
import json
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from bench.gpu.jobs import Deadline, Outcome, run_all
from bench.gpu.report import as_markdown, is_good
from bench.gpu.rows import read_rows
from bench.gpu.stages import STAGES, Context

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOTAL_SECONDS = 580


def why_no_gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return f"torch is not installed in {sys.executable}"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def machine(device: str) -> dict[str, str]:
    from bench.roofline import machine

    return machine(device)


class Run:
    """The report as far as it is known, and its files."""

    def __init__(self, context: Context):
        self.context = context
        self.report: dict = {"machine": machine(context.device), "jobs": [], "rows": []}
        self.report["benches"] = {}

    def log(self, text: str) -> None:
        with self.survive_a_full_disk(), (self.context.out / "gpu.log").open("a") as file:
            file.write(text)

    def done(self, outcome: Outcome) -> None:
        print(f"{outcome.job}: {outcome.outcome}, {outcome.seconds} s  {outcome.last_line[:100]}")
        self.report["jobs"].append(outcome.as_row())
        self.report["rows"] = read_rows(self.context.rows)
        self.add_benches()
        with self.survive_a_full_disk():
            (self.context.out / "gpu.json").write_text(json.dumps(self.report, indent=1) + "\n")
            (self.context.out / "gpu.md").write_text(as_markdown(self.report))

    def add_benches(self) -> None:
        """The runs that benchmarks have left; one that was stopped may have left half."""
        for path in self.context.scratch.glob("*.json"):
            with suppress(json.JSONDecodeError):
                self.report["benches"][path.stem] = json.loads(path.read_text())["cuda"]

    def survive_a_full_disk(self):
        return Survivor(self.context.out)


class Survivor:
    """Says that a file could not be written, and goes on: the screen has the results too."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, OSError):
            print(f"could not write to {self.folder}: {error}", file=sys.stderr)
            return True
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="stages by name")
    parser.add_argument("--deadline", type=float, default=TOTAL_SECONDS, help="seconds in all")
    parser.add_argument(
        "--rehearse", action="store_true", help="small sizes, on emulated kernels; needs no GPU"
    )
    args = parser.parse_args()
    if not args.rehearse and (reason := why_no_gpu()):
        print(f"make gpu needs a GPU: {reason}", file=sys.stderr)
        return 2
    # What a shell runs in the background ignores it, and so would the jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(args.deadline)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(Path(scratch), args.out.absolute(), "cpu" if args.rehearse else "cuda")
        run = Run(context)
        for stage in STAGES:
            if stage.name in args.only and (stage.rehearsed or not args.rehearse):
                limit = Deadline(stage.seconds, deadline)
                jobs = stage.jobs(context)
                run_all(jobs, stage.workers, stage.job_seconds, limit, run.log, run.done)
    return int(not is_good(run.report))


if __name__ == "__main__":
    sys.exit(main())
