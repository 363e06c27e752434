"""What the hardware counters say of an op's kernels, by Nsight Compute (ncu).

    python -m bench.gpu.counters --op swiglu --backend triton --rows rows.jsonl

Runs the op's program under ncu, which replays every kernel of the calls it is shown, and takes from
its report what decides a kernel's speed. One JSON object a kernel: {"op", "kernel", "counters":
{metric: value and unit}}. Clocks are left as they are.
"""

import argparse
import csv
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.jobs import ROOT, find_tool
from bench.gpu.rows import CRASHED, write_rows

SECTIONS = (
    "SpeedOfLight",
    "Occupancy",
    "WarpStateStats",
    "LaunchStats",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
)
# As the details page names them; of the reasons to wait only the largest.
KEPT = (
    "Duration",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Issue Slots Busy",
    "L2 Hit Rate",
    "Local Memory Spilling Requests",
)
KEPT_PARTS = ("tensor", "bank conflict")
STALLS = 3
LAUNCHES = 24  # of an op that ncu replays, once for each group of counters


def command(op: str, backend: str) -> list[str]:
    checked = ("--clock-control", "none", "--profile-from-start", "off")
    checked += ("--launch-count", str(LAUNCHES))
    sections = [x for name in SECTIONS for x in ("--section", name)]
    program = (sys.executable, "-m", "tests.gpu.smoke", "count", "--op", op, "--backend", backend)
    report = ("--csv", "--page", "details", "--print-details", "all")
    return [find_ncu() or "ncu", *checked, *sections, *report, *program, "--rows", "/dev/null"]


def kernels(op: str, report: str) -> Iterator[dict]:
    """The rows of ncu's table, one object a launch."""
    start = report.find('"ID"')
    by_launch: dict[str, dict] = {}
    for line in csv.DictReader(io.StringIO(report[start:])) if start >= 0 else ():
        name, value = line.get("Metric Name") or "", line.get("Metric Value") or ""
        if not line.get("Kernel Name"):  # what ncu says after its table
            continue
        launch = by_launch.setdefault(
            line["ID"], {"op": op, "kernel": line["Kernel Name"][:80], "counters": {}, "stalls": {}}
        )
        if name in KEPT or any(part in name.lower() for part in KEPT_PARTS):
            launch["counters"][name] = f"{value} {line.get('Metric Unit') or ''}".strip()
        elif "stall" in name.lower():
            launch["stalls"][name] = as_number(value)
    for launch in by_launch.values():
        stalls = sorted(launch.pop("stalls").items(), key=lambda item: -item[1])[:STALLS]
        yield launch | {"counters": launch["counters"] | dict(stalls)}


def as_number(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return 0.0


def counted(op: str, backend: str) -> Iterator[dict]:
    child = subprocess.Popen(
        command(op, backend), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    try:
        lines += child.stdout
    except KeyboardInterrupt:  # ncu hears it too, and reports what it has
        lines += child.stdout
    rows = list(kernels(op, "".join(lines)))
    yield from rows
    if not rows:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        yield {"part": "counters", "what": op, "verdict": CRASHED, "note": last.strip()[:300]}


def find_ncu() -> str | None:
    """On the PATH, or where its installer puts it."""
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return find_tool("ncu") or (str(installed[-1]) if installed else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    args = parser.parse_args()
    if find_ncu() is None:
        print("ncu, of Nsight Compute, is not installed")
        return 1
    return int(write_rows(args.rows, counted(args.op, args.backend)) > 0)


if __name__ == "__main__":
    sys.exit(main())
