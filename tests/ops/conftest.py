"""Runs the tests of an op on every backend that serves it."""

import contextlib

import pytest

from tests.backends import Backend, backends_of, use
from tests.ops import attention


def pytest_generate_tests(metafunc):
    """A module's OP names the op; the mark `backends` keeps a test to some of its backends. A test
    may also choose its backends by a parametrize mark of its own."""
    own = metafunc.definition.iter_markers("parametrize")
    if "backend" not in metafunc.fixturenames or any("backend" in mark.args[0] for mark in own):
        return
    served = backends_of(getattr(metafunc.module, "OP", None))
    mark = metafunc.definition.get_closest_marker("backends")
    chosen = [b for b in served if mark is None or b.name in mark.args]
    metafunc.parametrize("backend", chosen, ids=str, indirect=True)


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if too_slow(item)])
    items[:] = [item for item in items if not too_slow(item)]


def too_slow(item: pytest.Item) -> bool:
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    marked = {mark.name for mark in item.iter_markers()}
    return backend is not None and (
        (backend.interpreted and "slow_when_interpreted" in marked)
        or (backend.emulated and "slow_when_emulated" in marked)
    )


@pytest.fixture
def backend(request) -> Backend:
    """Runs a test with the kernels of one backend, on tensors of its device."""
    with use(request.param, getattr(request.module, "OP", None)), interpreted_tiles(request.param):
        yield request.param


def interpreted_tiles(backend: Backend) -> contextlib.AbstractContextManager:
    """The interpreter's time goes by the number of blocks, so that attention's are larger there."""
    return attention.tiles(attention.MEDIUM) if backend.interpreted else contextlib.nullcontext()


@pytest.fixture
def checked_values(backend, monkeypatch):
    """Values of tensors are checked on a CPU always, on a GPU where GLMKERN_CHECK asks for it."""
    if backend.name in ("triton", "cuda"):
        monkeypatch.setenv("GLMKERN_CHECK", "1")
