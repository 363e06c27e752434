"""Which launches of the Triton kernels bench.triton_resources compiles: a file an op.

`launches()` of a file yields them, and `REASON` says why its tiles have the sizes they have.
`MEMORY_BOUND` says whether two blocks should share a multiprocessor, so that one computes while the
other waits for memory.
"""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import triton

from glmkern.triton_kernels import tiles


class Launch(NamedTuple):
    """One launch as an op makes it: its label, the Triton function and its arguments."""

    label: str
    kernel: triton.JITFunction
    args: tuple
    num_warps: int
    num_stages: int
    constants: dict


def modules() -> dict[str, ModuleType]:
    """The files of this folder by the name of their op."""
    return {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    }


def launches_on(op: str, shared_kib: int) -> list[Launch]:
    """An op's launches, with the tiles for a chip whose blocks may have this much shared memory."""
    with mock.patch.object(tiles, "shared_memory_kib", lambda device: shared_kib):
        return list(modules()[op].launches())


@contextlib.contextmanager
def recorded(op: str, case: str):
    """Yields `record(function, *args)`, which calls a launcher of glmkern.triton_kernels.<op> on
    tensors without data (device "meta") and returns the launches it made. Where the op is a
    package, launches by the package's modules count too."""
    module = importlib.import_module(f"glmkern.triton_kernels.{op}")
    made = []

    def keep(kernel, programs, *args, num_warps, num_stages=3, **constants):
        made.append((kernel, args, num_warps, num_stages, constants))

    def record(function, *args, note="") -> Iterator[Launch]:
        made.clear()
        getattr(module, function)(*args)
        for launch in made:
            name = launch[0].__name__.removesuffix("_kernel")
            yield Launch(f"{name}{note}, {case}", *launch)

    with contextlib.ExitStack() as patches:
        for name, file in list(sys.modules.items()):
            if f"{name}.".startswith(f"{module.__name__}.") and hasattr(file, "launch"):
                patches.enter_context(mock.patch.object(file, "launch", keep))
        yield record
