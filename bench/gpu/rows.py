"""What `make gpu`'s programs share: results of one JSON object a line, each written as it comes,
the words of a failure, and turns on the GPU."""

import contextlib
import fcntl
import json
import signal
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

RIGHT, WRONG, CRASHED = "right", "wrong", "crashed"
STOPPED = "stopped: it hung, or took too long"
LONGEST_TURN = 30  # seconds that a process may have the GPU for itself


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Appends every row as soon as it is there; how many were not right."""
    bad = 0
    with path.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            bad += row.get("verdict", RIGHT) != RIGHT
    return bad


def read_rows(path: Path) -> list[dict]:
    """What the programs have written; one that was killed may have left half a line."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def in_a_line(error: BaseException) -> str:
    """Its type, its first line, and where in this repository it was raised."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if any(top in frame.filename for top in ("glmkern", "bench", "tests"))
    ]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}{where}"


def failure(error: BaseException) -> dict:
    """What a row says of work that was interrupted, or that raised."""
    stopped = isinstance(error, KeyboardInterrupt)
    return {"verdict": CRASHED, "note": STOPPED if stopped else in_a_line(error)}


def plain(dtype: torch.dtype) -> str:
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Of all processes that name this file, one is within the block at a time, and not for longer
    than LONGEST_TURN: the system ends it then, also within a call that hangs."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST_TURN)
        yield
        signal.alarm(0)
