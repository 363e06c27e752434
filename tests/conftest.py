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

import torch  # noqa: E402 (it reads the variable)

import tests.interpreter  # noqa: E402, F401 (before any import of Triton)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    for mark in (
        "backends(*names): of the backends that serve an op, the ones to test",
        "slow_when_interpreted: not for Triton's interpreter",
        "slow_when_emulated: not for that, and not for CUDA kernels on the host",
    ):
        config.addinivalue_line("markers", mark)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With --dist loadfile a file stays in one process, for its fixtures; the tests of ops, each
    independent and slow in a few files, are shared out one by one after all others."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith("tests/ops/") else nodeid.split("::")[0]

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """After an illegal access every later call of that process to the GPU fails: one of several
    processes of pytest-xdist ends itself then, and another one takes its place."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)


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
def triton_device():
    """The device of the tensors that the Triton kernels serve here."""
    from tests.backends import TRITON, available

    with available(TRITON):
        yield TRITON.device


@pytest.fixture
def threads():
    """Sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _random_numbers(request):
    """Every test draws its own inputs; GLMKERN_TEST_SEED=N gives all of them other ones."""
    seed = f"{os.environ.get('GLMKERN_TEST_SEED', 0)} {request.node.nodeid}"
    torch.manual_seed(zlib.crc32(seed.encode()))
