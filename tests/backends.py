"""The backends that a test runs on: which serve an op, and how one is forced.

On a machine with a GPU the kernels for GPUs run on it. Elsewhere Triton's interpreter runs the
Triton kernels and the host's compiler builds the CUDA kernels, both on CPU tensors.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

import glmkern
from glmkern import dispatch
from tests.interpreter import INTERPRETED, interpreter_corrected

# By backend, the files of kernels it must have. tests/ops/test_registration.py compares this with
# glmkern.backends(), so that no backend's tests are lost.
EVERY_OP = {
    "rms_norm",
    "bias_dropout",
    "rope",
    "swiglu",
    "prefix_attention",
    "quant_linear",
    "linear_cross_entropy",
}
SERVED = {"reference": EVERY_OP, "cpu": EVERY_OP, "triton": EVERY_OP, "cuda": EVERY_OP}


@dataclass(frozen=True)
class Backend:
    """`name` as glmkern.backend takes it, the `device` of its tensors, and `isa`, the instruction
    set of the C++ kernels."""

    name: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return self.name if self.isa is None else f"{self.name}-{self.isa}"

    @property
    def emulated(self) -> bool:
        """Whether the kernels are made for a GPU and run without one."""
        return self.name in ("triton", "cuda") and self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels, thousands of times slower than a GPU."""
        return self.name == "triton" and self.emulated

    def on_device(self, arguments: dict) -> dict:
        """`arguments` with what is on the CPU on the backend's device."""

        def move(x):
            if isinstance(x, tuple):  # a quantised weight
                return type(x)(*map(move, x))
            return x.to(self.device) if isinstance(x, torch.Tensor) and x.is_cpu else x

        return {name: move(x) for name, x in arguments.items()}

    @property
    def kernels(self):
        """The ops of its native library, without dispatch."""
        return getattr(torch.ops, f"glmkern_{self.name}")


def slow(*values):
    """A case of pytest.mark.parametrize that takes Triton's interpreter too long, and shows nothing
    there that others do not."""
    return pytest.param(*values, marks=pytest.mark.slow_when_interpreted)


def very_slow(*values):
    """One that takes the emulation of any GPU too long."""
    return pytest.param(*values, marks=pytest.mark.slow_when_emulated)


TRITON = Backend("triton", "cpu" if INTERPRETED else "cuda")
CUDA = Backend("cuda", "cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = Backend("reference")


@functools.cache
def every_backend() -> Sequence[Backend]:
    """The C++ kernels once for each instruction set of this chip."""
    glmkern.backends("cpu")
    try:
        isas = torch.ops.glmkern_cpu.isas().split()
    except (AttributeError, NotImplementedError):  # the library is not there: its tests say why
        isas = [None]
    return REFERENCE, *(Backend("cpu", isa=isa) for isa in isas), TRITON, CUDA


def backends_of(op: str | None) -> list[Backend]:
    """Those that must serve `op`, `<op>_fwd` or `<op>_bwd`; None is any."""
    module = None if op is None else dispatch.OPS[op].module
    return [b for b in every_backend() if op is None or module in SERVED[b.name]]


@contextlib.contextmanager
def use(backend: Backend, op: str | None = None) -> Iterator[None]:
    """Forces `backend`, and makes new tensors on its device. An error where it can't serve `op`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(available(backend))
        if backend.isa is not None:
            every_backend()  # loads the library
            before = torch.ops.glmkern_cpu.isa()
            torch.ops.glmkern_cpu.set_isa(backend.isa)
            stack.callback(torch.ops.glmkern_cpu.set_isa, before)
        if backend.device != "cpu":
            stack.enter_context(torch.device(backend.device))
        if op is not None:
            state = glmkern.backends(backend.device).rows[op, backend.name]
            assert state in ("chosen", "available"), f"{backend} does not serve {op}: {state}"
        stack.enter_context(glmkern.backend(backend.name))
        yield


@contextlib.contextmanager
def available(backend: Backend) -> Iterator[None]:
    """Emulates the GPU of a backend that needs one, where there is none."""
    with contextlib.ExitStack() as stack:
        if backend.emulated:
            stack.enter_context(_environment(**_emulation(backend.name)))
        if backend.interpreted:
            stack.enter_context(interpreter_corrected())
        yield


def _emulation(name: str) -> dict[str, str]:
    """The variables that make the backend serve CPU tensors."""
    if name == "triton":
        return {"TRITON_INTERPRET": "1"}
    from tests.cuda_on_host import library  # compiled on first use only

    return {"GLMKERN_CUDA_ON_HOST": str(library.build())}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets them for dispatch, which keeps its answers, and for no other test."""
    with mock.patch.dict(os.environ, variables):
        dispatch.why_unavailable.cache_clear()
        try:
            yield
        finally:
            dispatch.why_unavailable.cache_clear()
