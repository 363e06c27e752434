"""What the tests of ops share."""

import pytest

import glmkern


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Runs a test with the C++ kernels and with the reference; the module's OP names the op."""
    state = glmkern.backends("cpu").rows[request.module.OP, request.param]
    assert state in ("chosen", "available"), state
    with glmkern.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _triton(request):
    """The files test_<op>_triton.py test the Triton kernels."""
    if not request.module.__name__.endswith("_triton"):
        yield
        return
    with glmkern.backend("triton"):
        yield
