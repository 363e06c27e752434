"""Which implementation serves an op, and why.

Every op has up to four implementations of one definition: `cpu` (C++), `triton`, `cuda` (CUDA C++)
and `reference` (plain PyTorch, any device). A call takes the first one of its device's order that
supports its arguments; `GLMKERN_BACKEND=name` or `with glmkern.backend(name):` forces one, and a
forced one that cannot serve is an error, never a silent fallback.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

NAMES = ("cpu", "triton", "cuda", "reference")
# Triton before CUDA C++ on a GPU: the CUDA kernels exist for chips that Triton does not serve.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
MINIMUM_TRITON = (3, 6)
NATIVE_LIBRARIES = {"cpu": "_native.so", "cuda": "_native_cuda.so"}

# A plain module global: a ContextVar would break torch.compile(fullgraph=True).
_forced: str | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """One registered op: `name` is `<op>_fwd` or `<op>_bwd`, `module` the file name all its
    implementations share, `supports` a predicate over the op's arguments for the kernels."""

    name: str
    module: str
    reference: Callable
    supports: Callable[..., str | None]
    implementations: dict[str, Callable] = field(default_factory=dict)


_ops: dict[str, Op] = {}
# One Library object a namespace; the native libraries implement glmkern_cpu and glmkern_cuda.
_libraries = {
    ns: torch.library.Library(ns, "DEF")  # noqa: TOR901 (kept for the process's life)
    for ns in ("glmkern", "glmkern_cpu", "glmkern_cuda")
}
_libraries["glmkern_cpu"].define("isa() -> str")  # which instruction set its kernels use
_libraries["glmkern_cpu"].define("isas() -> str")
_libraries["glmkern_cpu"].define("set_isa(str name) -> ()")


def define_op(
    name: str,
    schema: str,
    *,
    module: str,
    reference: Callable,
    fake: Callable,
    supports: Callable[..., str | None],
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Registers `glmkern::<name>`, and its schema for native code as `glmkern_cpu::<name>` and
    `glmkern_cuda::<name>`.

    `reference` computes the op with plain PyTorch, `fake` its outputs' shapes, and `supports`
    takes the op's arguments and says None, or why the kernels can't serve them. `setup_context` and
    `backward` are the derivative as torch.library.register_autograd takes it; without them,
    differentiating the op (a second derivative, for a `_bwd`) is an error.
    """
    op = _ops[name] = Op(name, module, reference, supports, {"reference": reference})
    for library in _libraries.values():
        library.define(name + schema)

    def call(*args):
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        function = choose(op, device, args)
        if torch.is_autocast_enabled(device):  # an op computes in the precision it documents
            with torch.autocast(device, enabled=False):
                return function(*args)
        return function(*args)

    def no_derivative(ctx, *grads):
        raise NotImplementedError(f"{name} has no derivative; detach its inputs")

    library, qualified = _libraries["glmkern"], f"glmkern::{name}"
    library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(
        qualified, backward or no_derivative, setup_context=setup_context, lib=library
    )


def choose(op: Op, device: str, args: tuple) -> Callable:
    """The implementation of `op` that serves these arguments; RuntimeError where none may."""
    if _forced is not None:
        reason = why_not(op, _forced, device, args)
        if reason is not None:
            raise RuntimeError(
                f"the backend {_forced!r} is forced, but cannot serve {op.name}: {reason}; choose "
                f"another with GLMKERN_BACKEND or glmkern.backend(), or leave the choice open"
            )
        return op.implementations[_forced]
    for name in ORDER.get(device, ("reference",)):
        if why_not(op, name, device, args) is None:
            return op.implementations[name]
    raise AssertionError("the reference serves everything")


def why_not(op: Op, name: str, device: str, args: tuple | None = None) -> str | None:
    """None where backend `name` serves `op` on `device` (with `args`, if given), or the reason."""
    if name == "reference":
        return None
    reason = why_unavailable(name, device) or _find_implementation(op, name)
    if reason is None and args is not None:
        reason = op.supports(*args)
    return reason


@cache
def why_unavailable(name: str, device: str) -> str | None:
    """None where backend `name` can run on `device` ("cpu" or "cuda") here, or the reason."""
    if name == "triton":
        return _why_no_triton(device)
    if name != device:
        return f"it runs on {name} tensors, these are on {device}"
    return _load_native(name)


def _why_no_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it has other names, too
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
            return f"the kernels need Triton 3.6 or newer, found {version}: torch 2.10 brings one"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on GPUs (TRITON_INTERPRET=1, set before the start, emulates it on CPU)"
    if device != "cuda":
        return f"it runs on cuda tensors, these are on {device}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return f"Triton needs sm_80 or newer, this GPU is sm_{major}{minor}"
    return None


@cache
def _load_native(name: str) -> str | None:
    """Loads one native library; None on success, or why it is not there."""
    path = Path(__file__).with_name(NATIVE_LIBRARIES[name])
    if not path.is_file():
        return f"{path.name} was not built: {_why_not_built(path.stem)}"
    if name == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if _is_cut_short(path):  # loading it would kill the process
        return f"{path.name} could not be loaded: it is cut short, install glmkern again"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {str(error).splitlines()[0]}"
    if name == "cpu":
        torch.ops.glmkern_cpu.isa()  # a GLMKERN_CPU_ISA that cannot be served is an error at once
    return None


def _why_not_built(library: str) -> str:
    report = Path(__file__).with_name("_build.json")
    if not report.is_file():
        return "glmkern runs from a folder that was never installed (pip install -e .)"
    return json.loads(report.read_text())[library] or "its file is gone: install glmkern again"


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before the table of sections that its header promises at the end."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # not 64-bit little-endian ELF: for the loader to judge
    offset, entry_size, entries = struct.unpack_from("<40xQ10xHH", header)
    return path.stat().st_size < offset + entry_size * entries


@cache  # every call of an op asks, and looking for a module reads the disk
def _find_implementation(op: Op, name: str) -> str | None:
    """Looks for the kernel once the backend is known to run; None if found, or the reason."""
    if name == "triton":
        module = f"glmkern.triton_kernels.{op.module}"
        if importlib.util.find_spec(module) is None:
            return f"{op.module} has no Triton kernel yet"
        op.implementations[name] = getattr(importlib.import_module(module), op.name)
        return None
    qualified = f"glmkern_{name}::{op.name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, name.upper()):
        return f"{op.module} has no {name} kernel yet"
    op.implementations[name] = getattr(getattr(torch.ops, f"glmkern_{name}"), op.name).default
    return None


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces one implementation for the whole process while the block runs.

    `name` is "cpu", "triton", "cuda" or "reference"; None leaves the choice open. An op that the
    backend cannot serve raises RuntimeError with the reason.
    """
    global _forced
    previous, _forced = _forced, _checked_name(name)
    try:
        yield
    finally:
        _forced = previous


def _checked_name(name: str | None) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"there is no backend {name!r}; the backends are {', '.join(NAMES)}")
    return name


@dataclass(frozen=True)
class BackendsTable:
    """What `glmkern.backends()` returns: `rows` maps (op, backend) to "chosen", "available" or
    the reason why not; printed as a table."""

    device: str
    rows: dict[tuple[str, str], str]

    def __str__(self) -> str:
        lines = [f"{'op':<28}{'backend':<11}on {self.device}"]
        lines += [f"{op:<28}{name:<11}{state}" for (op, name), state in self.rows.items()]
        return "\n".join(lines)


def backends(device: str | None = None) -> BackendsTable:
    """A table, op x backend: chosen, available, or why not, for calls on `device` ("cpu", "cuda";
    default: the GPU if torch sees one). Arguments can still rule a kernel out at a call."""
    import glmkern.ops  # noqa: F401 (registers the ops)

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device).type
    rows = {}
    for op in _ops.values():
        reasons = {name: why_not(op, name, device) for name in NAMES}
        order = ORDER.get(device, ("reference",)) if _forced is None else (_forced,)
        chosen = next((name for name in order if reasons[name] is None), None)
        for name in NAMES:
            state = "chosen" if name == chosen else reasons[name] or "available"
            rows[op.name, name] = state
    return BackendsTable(device, rows)


_forced = _checked_name(os.environ.get("GLMKERN_BACKEND") or None)
