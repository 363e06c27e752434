"""The machine that runs the kernels of a library: its random order, its barriers, its counters."""

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


@dataclass
class Access:
    """An instruction of a kernel that accesses memory: how often warps come to it, and what it
    moves. Shared memory is counted in `wavefronts`, of which an access needs `least`; global memory
    in the bytes that lanes ask for and sectors of 32 bytes."""

    kind: str  # shared-read, shared-write, global-read or global-write
    place: str  # "file:line", and where it was inlined
    count: int
    bytes: int
    wavefronts: int
    least: int
    sectors: int


@dataclass
class Kernel:
    """What one kernel did in all of its blocks; `shared_bytes` is of one block."""

    blocks: int
    barriers: int
    shared_bytes: int
    accesses: list[Access] = field(default_factory=list)
    barrier_places: dict[int, str] = field(default_factory=dict)  # by what remove_barrier takes

    def total(self, name: str, kind: str) -> int:
        """The sum over accesses whose kind begins with `kind`."""
        return sum(getattr(a, name) for a in self.accesses if a.kind.startswith(kind))

    @property
    def conflicts(self) -> int:
        """Wavefronts that shared memory needs because words share a bank."""
        return self.total("wavefronts", "shared") - self.total("least", "shared")

    @property
    def useful(self) -> float:
        """Bytes asked for, of those that global memory moves."""
        return self.total("bytes", "global") / (32 * self.total("sectors", "global"))


class Plan(NamedTuple):
    """How quant_linear's tensor cores share out a product, as csrc/cuda/kernels/quant_linear/mma.h
    names it."""

    tokens: int
    warps: int
    depth: int
    token_blocks: int
    result_blocks: int
    steps: int
    splits: int

    @property
    def blocks(self) -> int:
        return self.token_blocks * self.result_blocks * self.splits


# Of quant_linear, as csrc/cuda/quant_linear_cuda_run.h numbers them.
VARIANTS = ("gemv", "mma", "slab")
L2_BYTES = 4 << 20
CODE_VERSION = 80


class Machine:
    """Of the library at `path`, which tests.cuda_on_host.library builds."""

    def __init__(self, path: Path):
        self._path = path
        self._library = ctypes.CDLL(str(path))
        self._library.cuda_on_host_stop_counting.restype = ctypes.c_char_p

    def seed(self, seed: int) -> AbstractContextManager[None]:
        """Another order of the threads, in each launch the same."""
        return self._setting("seed", ctypes.c_uint64, seed, otherwise=1)

    def without_barrier(self, place: int) -> AbstractContextManager[None]:
        """No thread waits there; `place` is a key of Kernel.barrier_places."""
        return self._setting("remove_barrier", ctypes.c_uint64, place, otherwise=0)

    def l2_cache(self, size: int) -> AbstractContextManager[None]:
        """Programs are told of an L2 cache of so many bytes."""
        return self._setting("l2_bytes", ctypes.c_int, size, otherwise=L2_BYTES)

    def splits(self, count: int) -> AbstractContextManager[None]:
        """The sums of quant_linear on tensor cores and of prefix_attention go in so many splits."""
        return self._setting("force_splits", ctypes.c_int, count, otherwise=0)

    def code_version(self, version: int) -> AbstractContextManager[None]:
        """The code that runs was compiled for sm_<version>."""
        return self._setting("code_version", ctypes.c_int, version, otherwise=CODE_VERSION)

    def variant(self, name: str) -> AbstractContextManager[None]:
        """quant_linear takes that one of VARIANTS."""
        return self._setting("force_quant_linear", ctypes.c_int, VARIANTS.index(name), otherwise=-1)

    @contextlib.contextmanager
    def _setting(
        self, name: str, ctype: Callable[[int], object], value: int, otherwise: int
    ) -> Iterator[None]:
        """The library's cuda_on_host_<name> is told `value` here, and `otherwise` after."""
        tell = getattr(self._library, f"cuda_on_host_{name}")
        tell(ctype(value))
        try:
            yield
        finally:
            tell(ctype(otherwise))

    def plan(self, rows: int, n: int, k: int, backward: bool) -> Plan:
        """Of `rows` tokens with a weight [n, k] of 4 bits."""
        numbers = (ctypes.c_int * len(Plan._fields))()
        sizes = [ctypes.c_int64(size) for size in (rows, n, k)]
        self._library.cuda_on_host_plan_mma(*sizes, ctypes.c_bool(backward), numbers)
        return Plan(*numbers)

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, Kernel]]:
        """The kernels of the block, by name with template arguments; filled at its end."""
        kernels: dict[str, Kernel] = {}
        self._library.cuda_on_host_start_counting()
        try:
            yield kernels
        finally:
            text = self._library.cuda_on_host_stop_counting().decode()
        kernels.update(self._parse(text))

    def _parse(self, text: str) -> dict[str, Kernel]:
        lines = [
            (kind, [int(n) for n in numbers])
            for kind, *numbers in map(str.split, text.splitlines())
        ]
        kernels = {numbers[0]: Kernel(*numbers[1:]) for kind, numbers in lines if kind == "kernel"}
        for kind, (kernel, pc, *numbers) in (line for line in lines if line[0] != "kernel"):
            if kind == "barrier":
                kernels[kernel].barrier_places[pc] = where(self._path, pc)
            else:
                kernels[kernel].accesses.append(Access(kind, where(self._path, pc), *numbers))
        return {name_of(self._path, pc): kernel for pc, kernel in kernels.items()}


@functools.cache
def where(path: Path, pc: int) -> str:
    """The places of the call that returns to `pc`: the function's, and where it was inlined."""
    places = _addr2line(path, pc - 1)[1::2]
    return " < ".join(place.rsplit("/", 1)[-1].split()[0] for place in places)


@functools.cache
def name_of(path: Path, pc: int) -> str:
    """The short name of the kernel at `pc`."""
    return short_name(_addr2line(path, pc)[0])


def short_name(function: str) -> str:
    """A kernel's name and template arguments, of what a demangler writes."""
    for part in ("(anonymous namespace)::", "glmkern::cuda::", "glmkern::", "void "):
        function = function.replace(part, "")
    return function.split("(")[0]


def _addr2line(path: Path, pc: int) -> list[str]:
    command = ["addr2line", "-Cfie", path, hex(pc)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
