"""What importing the package costs. That `glmkern --help` needs no torch is in test_cli.py."""

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_SECONDS = 0.050
# A machine on which torch's import takes longer than this is slow, and gets as much more time.
TORCH_SECONDS = 1.25
PROCESSES = 15  # at most; a busy machine slows some, so the fastest counts

# Time of the processor, which other processes cannot stretch by waiting for their turn; compiled
# modules are kept, as Python keeps them unless PYTHONDONTWRITEBYTECODE says otherwise.
MEASURED = """
import sys, time
before = time.process_time()
{before}
sys.pycache_prefix, sys.dont_write_bytecode = {cache!r}, False
start = time.process_time()
{imports}
print(start - before, time.process_time() - start, "torch" in sys.modules)
"""


def run(before: str, imports: str, cache: Path) -> tuple[float, float, bool]:
    """Seconds of `before` and of `imports` in a new process, and whether torch is loaded then."""
    program = MEASURED.format(before=before, imports=imports, cache=str(cache))
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    first, second, has_torch = done.stdout.split()
    return float(first), float(second), has_torch == "True"


@pytest.mark.parametrize(
    ("before", "imports"),
    [("", "import glmkern"), ("import torch", "import glmkern; glmkern.ops")],
    ids=["alone", "with its ops, beside torch"],
)
def test_importing_costs_at_most_50_ms_beside_torch(before, imports, tmp_path):
    measured = []
    while len(measured) < PROCESSES:
        torch_seconds, seconds, has_torch = run(before, imports, tmp_path)
        assert has_torch == bool(before)
        measured.append(f"{seconds:.3f} s after {torch_seconds:.2f} s of torch")
        if seconds <= LIMIT_SECONDS * max(1.0, torch_seconds / TORCH_SECONDS):
            return
    pytest.fail(f"{PROCESSES} imports took too long: {', '.join(measured)}")
