"""Child processes with a time limit: what a job did, however it ended.

A job hears an interrupt shortly before its limit, so that it can say what it has, and is killed
with all that it started when the limit has passed. Nothing that it does ends the process that
waits for it.
"""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """One child process."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: "passed", "failed with 1", "stopped after 60 s", "no time was left" or
    why it did not start. `last_line` is the last of its output."""

    job: str
    outcome: str
    seconds: float = 0.0
    last_line: str = ""

    def as_row(self) -> dict:
        return asdict(self)


def find_tool(name: str) -> str | None:
    """A tool of CUDA's, on the PATH or where CUDA is usually installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


class Deadline:
    """When something has to be over: so many seconds from now, or at another one's end."""

    def __init__(self, seconds: float, within: "Deadline | None" = None):
        self.end = time.monotonic() + seconds
        if within is not None:
            self.end = min(self.end, within.end)

    def left(self) -> float:
        return self.end - time.monotonic()


def run_all(
    jobs: Sequence[Job],
    workers: int,
    seconds: float,
    deadline: Deadline,
    log: Callable[[str], None],
    done: Callable[[Outcome], None],
) -> None:
    """Runs the jobs, `workers` at once in their order, each for `seconds` at most; `done` hears of
    each as it ends."""
    lock = threading.Lock()

    def work(job: Job) -> None:
        outcome, text = run_job(job, Deadline(seconds, deadline))
        with lock:
            log(f"== {job.name}: {outcome.outcome}, {outcome.seconds} s\n{text}")
            done(outcome)

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, job) for job in jobs]:
            future.result()


def run_job(job: Job, deadline: Deadline) -> tuple[Outcome, str]:
    """Its outcome and its output."""
    limit = int(deadline.left() + 0.5)
    if limit < 1:
        return Outcome(job.name, "no time was left"), ""
    start = time.monotonic()
    try:
        child = subprocess.Popen(
            job.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | job.environment,
        )
    except OSError as error:
        return Outcome(job.name, f"did not start: {error}"), ""
    with time_limit(child, limit) as late:
        lines = list(child.stdout)
        code = child.wait()
    ended = f"stopped after {limit} s" if late else f"failed with {code}" if code else "passed"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return Outcome(job.name, ended, round(time.monotonic() - start, 1), last), "".join(lines)


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
