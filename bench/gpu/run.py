"""Runs stages and keeps the report: its files are written after every job."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.gpu import stages
from bench.gpu.jobs import Deadline, Outcome, run_all
from bench.gpu.report import as_markdown, is_good
from bench.gpu.rows import read_rows
from bench.gpu.stages import Context, Stage
from bench.roofline import machine


def find_stages(names: Sequence[str] | None) -> list[Stage]:
    """Those of these names, all for None, in their order. ValueError for another name."""
    known = [stage.name for stage in stages.STAGES]
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"there is no stage {', '.join(unknown)}; they are {', '.join(known)}")
    return [stage for stage in stages.STAGES if names is None or stage.name in names]


def run(chosen: Sequence[Stage], out: Path, device: str, seconds: float) -> int:
    """0 where all is right, else 1. On "cpu" only the stages that can be rehearsed run."""
    out.mkdir(parents=True, exist_ok=True)
    for grows in ("gpu.log", "profiles.txt"):
        (out / grows).unlink(missing_ok=True)
    deadline = Deadline(seconds)
    with tempfile.TemporaryDirectory() as scratch:
        report = Report(Context(Path(scratch), out.absolute(), device))
        for stage in chosen:
            if stage.rehearsed or device == "cuda":
                limit = Deadline(stage.seconds, deadline)
                jobs = stage.jobs(report.context)
                run_all(jobs, stage.workers, stage.job_seconds, limit, report.log, report.done)
    return int(not is_good(report.found))


class Report:
    """What is known so far, `found`, and its files."""

    def __init__(self, context: Context):
        self.context = context
        self.found: dict = {"machine": machine(context.device), "jobs": [], "rows": []}
        self.found["benches"] = {}

    def log(self, text: str) -> None:
        with self._on_a_full_disk_too(), (self.context.out / "gpu.log").open("a") as file:
            file.write(text)

    def done(self, outcome: Outcome) -> None:
        line = f"{outcome.job}: {outcome.outcome}, {outcome.seconds} s  {outcome.last_line[:100]}"
        print(line, flush=True)
        self.found["jobs"].append(outcome.as_row())
        self.found["rows"] = read_rows(self.context.rows)
        self._add_benches()
        with self._on_a_full_disk_too():
            (self.context.out / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n")
            (self.context.out / "gpu.md").write_text(as_markdown(self.found))

    def _add_benches(self) -> None:
        """The runs that benchmarks have left; one that was stopped may have left half."""
        for path in self.context.scratch.glob("*.json"):
            with contextlib.suppress(json.JSONDecodeError):
                self.found["benches"][path.stem] = json.loads(path.read_text())["cuda"]

    @contextlib.contextmanager
    def _on_a_full_disk_too(self) -> Iterator[None]:
        """Says that a file could not be written, and goes on: the screen has the results too."""
        try:
            yield
        except OSError as error:
            print(f"could not write to {self.context.out}: {error}", file=sys.stderr)
