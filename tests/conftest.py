"""Fixtures every test may use."""

import os
import signal
import zlib
from pathlib import Path

import pytest

# Small shapes: threads would only wait for each other. Tests of threading set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a shell runs in the background ignores Ctrl-C, which some tests press.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.interpreter import (  # noqa: E402, F401 (torch reads the variable; pytest the names)
    device,
    interpreter_mended,
    pytest_pycollect_makemodule,
    pytest_runtest_logfinish,
)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded official outputs (golden/), real data and configurations (data/)."""
    folder = Path(os.environ.get("GLMKERN_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.fail(f"{folder} has no golden/ folder; set GLMKERN_SHARED to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _random_numbers(request):
    """Every test draws its own inputs; GLMKERN_TEST_SEED=N gives all of them other ones."""
    import torch

    seed = f"{os.environ.get('GLMKERN_TEST_SEED', 0)} {request.node.nodeid}"
    torch.manual_seed(zlib.crc32(seed.encode()))
