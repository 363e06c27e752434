"""What the tests of ops share, and where those of Triton kernels, `test_<op>_triton.py`, run.

On a machine with a GPU they run on it. Elsewhere each file runs as one test, in a process of its
own under TRITON_INTERPRET=1: the variable must be set before the first import of Triton, and would
stop every other use of it. To run one test of such a file: TRITON_INTERPRET=1 pytest FILE -k NAME.
"""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

import glmkern

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    """Runs a test with the C++ kernels and with the reference; the module's OP names the op."""
    state = glmkern.backends("cpu").rows[request.module.OP, request.param]
    assert state in ("chosen", "available"), state
    with glmkern.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def device() -> str:
    """Where a Triton kernel's tensors live."""
    return "cpu" if INTERPRETED else "cuda"


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.endswith("_triton.py") and not (INTERPRETED or torch.cuda.is_available()):
        return InterpretedModule.from_parent(parent, path=module_path)
    return None


class InterpretedModule(pytest.File):
    def collect(self):
        yield InterpretedTests.from_parent(self, name="interpreted")


class InterpretedTests(pytest.Item):
    """All tests of one file, in a child process."""

    def runtest(self):
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", str(self.path)]
        child = subprocess.run(command, cwd=self.config.rootpath, capture_output=True, text=True,
                               check=False, env={**os.environ, "TRITON_INTERPRET": "1"})
        if child.returncode != 0:
            pytest.fail(f"{' '.join(command)} ended with {child.returncode}\n{child.stdout}"
                        f"{child.stderr}", pytrace=False)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


@pytest.fixture(autouse=True, scope="session")
def _interpreter_rounds_to_bfloat16():
    """The interpreter cuts float32 off to bfloat16, where the hardware rounds to nearest even."""
    if not INTERPRETED:
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, type_):
        if source.dtype.scalar != tl.float32 or type_.scalar != tl.bfloat16:
            return cast(self, source, type_)
        bits = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    with mock.patch.object(InterpreterBuilder, "cast_impl", rounding_cast):
        yield
