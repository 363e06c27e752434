"""Where the tests of Triton kernels, `test_<name>_triton.py`, run.

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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    """Where a Triton kernel's tensors live."""
    return "cpu" if INTERPRETED else "cuda"


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.endswith("_triton.py") and not (INTERPRETED or torch.cuda.is_available()):
        return InterpretedModule.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """After an illegal access every later call of that process to the GPU fails: one of several
    processes of pytest-xdist ends itself then, and another one takes its place."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)


class InterpretedModule(pytest.File):
    def collect(self):
        yield InterpretedTests.from_parent(self, name="interpreted")


class InterpretedTests(pytest.Item):
    """All tests of one file, in a child process."""

    def runtest(self):
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", str(self.path)]
        child = subprocess.run(
            command,
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        if child.returncode != 0:
            pytest.fail(
                f"{' '.join(command)} ended with {child.returncode}\n{child.stdout}{child.stderr}",
                pytrace=False,
            )

    def reportinfo(self):
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


@pytest.fixture(autouse=True, scope="session")
def interpreter_mended():
    """The interpreter cuts float32 off to bfloat16, where the hardware rounds to nearest even, and
    takes the bits of a product's or a sum's bfloat16 operands for integers. Triton 3.6's has no
    bfloat16 constants, and makes a loop's bound of an array of one element, which numpy refuses
    since 2.4."""
    if not INTERPRETED:
        yield
        return
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, type_):
        if source.dtype.scalar != tl.float32 or type_.scalar != tl.bfloat16:
            return cast(self, source, type_)
        bits = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    dot = InterpreterBuilder.create_dot

    def widening_dot(self, a, b, *args):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *args)

    binary = InterpreterBuilder.binary_op

    def widening_binary(self, a, b, operation):
        if a.dtype.scalar != tl.bfloat16 or operation not in (np.add, np.subtract, np.multiply):
            return binary(self, a, b, operation)
        a, b = (cast(self, x, tl.float32) for x in (a, b))
        return rounding_cast(self, binary(self, a, b, operation), tl.bfloat16)

    def bfloat16_constant(self, value):
        return rounding_cast(self, self.get_fp32(value), tl.bfloat16)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_index),
        mock.patch.object(InterpreterBuilder, "get_bf16", bfloat16_constant, create=True),
        mock.patch.object(InterpreterBuilder, "cast_impl", rounding_cast),
        mock.patch.object(InterpreterBuilder, "binary_op", widening_binary),
        mock.patch.object(InterpreterBuilder, "create_dot", widening_dot),
    ):
        yield
