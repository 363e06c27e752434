"""Which lines of csrc/cuda the tests have run, after they have.

    python -m tests.cuda_on_host.coverage       prints each file's share; fails below 95 %

The library that tests build for the host counts how often each line runs, and writes the counts
when a process of the tests ends. A line of a template counts if any instance has run it.
"""

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.cuda_on_host.host import CSRC
from tests.cuda_on_host.library import build

LEAST = 0.95


def lines_run(folder: Path) -> dict[Path, dict[int, bool]]:
    """By file of csrc/cuda: whether each line with code has run."""
    gcov = shutil.which("gcov")
    assert gcov, "gcov is missing: it comes with g++"
    found: dict[Path, dict[int, bool]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as reports:
        objects = [str(path) for path in folder.glob("*.gcda")]
        command = [gcov, "--json-format", "--hash-filenames", *objects]
        subprocess.run(command, cwd=reports, check=True, stdout=subprocess.DEVNULL)
        for report in Path(reports).glob("*.gcov.json.gz"):
            for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
                path = Path(file["file"])
                if not path.is_relative_to(CSRC / "cuda"):
                    continue
                for line in file["lines"]:
                    number = line["line_number"]
                    found[path][number] = found[path].get(number, False) or line["count"] > 0
    return found


def main() -> int:
    folder = build().parent
    found = lines_run(folder)
    if not found:
        print(f"no counts in {folder}: run the tests of tests/ops and tests/cuda_on_host first")
        return 1
    print("lines of CUDA C++ that the tests have run:")
    for path, lines in sorted(found.items()):
        missing = sorted(number for number, run in lines.items() if not run)
        note = f"   not: {', '.join(map(str, missing))}" if missing else ""
        share = 1 - len(missing) / len(lines)
        print(f"  {share:6.1%}  {len(lines):4} of {path.relative_to(CSRC)}{note}")
    every = [run for lines in found.values() for run in lines.values()]
    print(f"  {sum(every) / len(every):6.1%}  {len(every):4} in all")
    if sum(every) < LEAST * len(every):
        print(f"less than {LEAST:.0%} of the lines have run")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
