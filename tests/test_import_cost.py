"""What importing the package costs. That `glmkern --help` needs no torch is in test_cli.py."""

import subprocess
import sys

import pytest

LIMIT_SECONDS = 0.050
PROCESSES = 5

# Time of the processor, which other processes cannot stretch by waiting for their turn.
MEASURED = """
import sys, time
{before}
start = time.process_time()
{imports}
print(time.process_time() - start, "torch" in sys.modules)
"""


def run(before: str, imports: str) -> tuple[float, bool]:
    """Seconds of `imports` after `before` in a new process, and whether torch is loaded then."""
    program = MEASURED.format(before=before, imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    seconds, has_torch = done.stdout.split()
    return float(seconds), has_torch == "True"


@pytest.mark.parametrize(
    ("before", "imports"),
    [("", "import glmkern"), ("import torch", "import glmkern; glmkern.ops")],
    ids=["alone", "with its ops, beside torch"],
)
def test_importing_costs_at_most_50_ms_beside_torch(before, imports):
    measured = [run(before, imports) for _ in range(PROCESSES)]
    assert min(seconds for seconds, _ in measured) <= LIMIT_SECONDS
    assert {has_torch for _, has_torch in measured} == {bool(before)}
