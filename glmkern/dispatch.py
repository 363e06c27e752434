"""Which implementation serves an op, and why.

Every op has up to four implementations of one definition: `cpu` (C++), `triton`, `cuda` (CUDA C++)
and `reference` (plain PyTorch, any device). A call takes the first one of its device's order that
supports its arguments. `GLMKERN_BACKEND=name` or `with glmkern.backend(name):` forces one; a forced
one that cannot serve is an error, never a silent fallback.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch._C import DispatchKeySet
from torch._ops import OpOverload

from glmkern import native

NAMES = ("cpu", "triton", "cuda", "reference")
# Triton before CUDA C++, which serves older chips too: where both do, their predicted times are
# equal (bench/NOTES.md), but for ops that say otherwise.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
CUDA_FIRST = ("cuda", "triton", "reference")
MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = {"triton": (8, 0), "cuda": (7, 5)}
# Backends whose kernels check values themselves: C++ reads a CPU tensor faster than Python does,
# and raises the same sentences.
CHECK_VALUES_THEMSELVES = frozenset({"cpu"})

Implementation: TypeAlias = Callable[..., Any]
Predicate: TypeAlias = Callable[..., str | None]
ValueCheck: TypeAlias = Callable[..., None]

# A plain module global: a ContextVar would break torch.compile(fullgraph=True).
_forced: str | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """One registered op, as `define_op` describes it."""

    name: str
    module: str
    reference: Implementation
    supports: Mapping[str, Predicate]
    check_values: ValueCheck | None
    reference_reads_values: bool
    cuda_first: Callable[..., bool] | None


OPS: dict[str, Op] = {}
# One Library object a namespace; the native libraries implement glmkern_cpu and glmkern_cuda.
_libraries = {
    ns: torch.library.Library(ns, "DEF")  # noqa: TOR901 (kept for the process's life)
    for ns in ("glmkern", "glmkern_cpu", "glmkern_cuda")
}
# The instruction set of the CPU kernels: the one in use, all that this chip runs (in one line),
# and the choice of another for tests.
_libraries["glmkern_cpu"].define("isa() -> str")
_libraries["glmkern_cpu"].define("isas() -> str")
_libraries["glmkern_cpu"].define("set_isa(str name) -> ()")


def define_op(
    name: str,
    schema: str,
    *,
    module: str,
    reference: Implementation,
    fake: Callable[..., Any],
    supports: Mapping[str, Predicate],
    check_values: ValueCheck | None = None,
    reference_reads_values: bool = False,
    waits_on_gpu: bool = False,
    cuda_first: Callable[..., bool] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers `glmkern::<name>`, and its schema for native code as `glmkern_cpu::<name>` and
    `glmkern_cuda::<name>`.

    Args:
        name: `<op>_fwd` or `<op>_bwd`.
        schema: the arguments, of which the first is a tensor on the call's device, and the results.
        module: the name that the files of all implementations share.
        reference: computes the op with plain PyTorch.
        fake: the shapes of the results.
        supports: a predicate for each of "cpu", "triton" and "cuda". It takes the op's arguments
            and says None, or why the backend's kernel cannot serve them. It may ask the capability
            of their device.
        check_values: takes the op's arguments and raises ValueError where values, such as lengths
            or labels, do not fit. It runs before the backend does, where values may be read: on the
            CPU, and everywhere under GLMKERN_CHECK=1.
        reference_reads_values: the reference reads these values on every device, so they are
            checked wherever it runs.
        waits_on_gpu: kernels read values back to the host, so that no CUDA graph can hold a call.
        cuda_first: takes the op's arguments and says whether CUDA C++ comes before Triton on their
            GPU.
        setup_context, backward: the derivative as torch.library.register_autograd takes it; without
            them, differentiating the op (a second derivative, for a `_bwd`) is an error.
    """
    predicates = {**supports, "reference": _supports_everything}
    op = OPS[name] = Op(
        name, module, reference, predicates, check_values, reference_reads_values, cuda_first
    )
    tags = (torch.Tag.cudagraph_unsafe,) if waits_on_gpu else ()
    for library in _libraries.values():
        library.define(name + schema, tags=tags)

    def call(*args: Any) -> Any:
        device = args[0].device
        chosen, function = choose(op, device, args)
        if check_values is not None and _may_read_values(op, chosen, device):
            check_values(*args)
        if torch.is_autocast_enabled(device.type):  # an op computes in the precision it documents
            with torch.autocast(device.type, enabled=False):
                return function(*args)
        return function(*args)

    library, qualified = _libraries["glmkern"], f"glmkern::{name}"
    library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=library
        )
    else:
        overload = getattr(torch.ops.glmkern, name).default
        library.impl(name, partial(_call_undifferentiable, overload), "Autograd", with_keyset=True)


# What register_autograd would do with a derivative that raises. It makes classes for each op, which
# for ten ops was a sixth of the time that importing all takes.
def _call_undifferentiable(op: OpOverload, keyset: DispatchKeySet, *args: Any) -> Any:
    if torch.is_grad_enabled():
        return _Undifferentiable.apply(op, keyset, *args)  # type: ignore[no-untyped-call]
    return _call_below_autograd(op, keyset, *args)


def _call_below_autograd(op: OpOverload, keyset: DispatchKeySet, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _Undifferentiable(torch.autograd.Function):
    """A call whose results know that they have no derivative, if an argument requires one."""

    @staticmethod
    def forward(ctx: Any, op: OpOverload, keyset: DispatchKeySet, *args: Any) -> Any:
        ctx.name = op.name().removeprefix("glmkern::")
        return _call_below_autograd(op, keyset, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{ctx.name} has no derivative; detach its inputs")


def _supports_everything(*args: Any) -> None:
    """The predicate of the reference."""


def _may_read_values(op: Op, name: str, device: torch.device) -> bool:
    """Whether `call` checks values before backend `name` computes."""
    if name in CHECK_VALUES_THEMSELVES:
        return False
    return (
        device.type == "cpu"
        or (name == "reference" and op.reference_reads_values)
        or os.environ.get("GLMKERN_CHECK") == "1"
    )


def waits_for_values(name: str, device: torch.device) -> bool:
    """Whether a call of op `name` on `device` reads values of its arguments there, for which a GPU
    has to come to an end."""
    op = OPS[name]
    serving = (
        backend
        for backend in order(device)
        if not isinstance(find_implementation(op, backend, device), str)
    )
    return _may_read_values(op, next(serving, "reference"), device)


def choose(op: Op, device: torch.device, args: tuple[Any, ...]) -> tuple[str, Implementation]:
    """The backend that serves these arguments, and its implementation; RuntimeError where a forced
    one cannot."""
    for name in order_of(op, device, args):
        found = find_implementation(op, name, device)
        if not isinstance(found, str):
            found = op.supports[name](*args) or found
        if not isinstance(found, str):
            return name, found
        if _forced is not None:
            raise RuntimeError(
                f"the backend {_forced!r} is forced, but cannot serve {op.name}: {found}; choose "
                f"another with GLMKERN_BACKEND or glmkern.backend(), or leave the choice open"
            )
    raise AssertionError("the reference serves everything")


def order(device: torch.device) -> tuple[str, ...]:
    """The backends that a call on `device` tries, one after the other."""
    return _preferred(device) if _forced is None else (_forced,)


def order_of(op: Op, device: torch.device, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The same for one call."""
    if _forced is None and op.cuda_first is not None and device.type == "cuda":
        if op.cuda_first(*args):
            return CUDA_FIRST
    return order(device)


@cache  # a device builds its type's name every time that it is asked
def _preferred(device: torch.device) -> tuple[str, ...]:
    return ORDER.get(device.type, ("reference",))


def find_implementation(op: Op, name: str, device: torch.device) -> Implementation | str:
    """What backend `name` computes `op` with on `device`, or the reason why it cannot."""
    if name == "reference":
        return op.reference
    return why_unavailable(name, device) or _load_implementation(op, name, device)


@cache  # every call of an op asks, and looking for a module reads the disk
def _load_implementation(op: Op, name: str, device: torch.device) -> Implementation | str:
    """What a backend that can run on `device` computes `op` with, or the reason why it cannot."""
    function: Implementation
    if name == "triton":
        module = f"glmkern.triton_kernels.{op.module}"
        if importlib.util.find_spec(module) is None:
            return f"{op.module} has no Triton kernel yet"
        function = getattr(importlib.import_module(module), op.name)
        return function
    key = device.type.upper()  # CPU also where CUDA kernels run on the host
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"glmkern_{name}::{op.name}", key):
        return f"{op.module} has no {name} kernel yet"
    function = getattr(getattr(torch.ops, f"glmkern_{name}"), op.name).default
    return function


@cache
def why_unavailable(name: str, device: torch.device | str) -> str | None:
    """None where backend `name` can run on `device` here, or the reason."""
    device = torch.device(device)
    if name == "triton":
        return _why_no_triton(device)
    library = os.environ.get("GLMKERN_CUDA_ON_HOST")
    if library and (name, device.type) == ("cuda", "cpu"):  # for tests: the kernels compiled as C++
        return native.load_file(Path(library).absolute())
    if name != device.type:
        return f"it runs on {name} tensors, these are on {device.type}"
    return native.load_library(name) or (_too_old(name, device) if name == "cuda" else None)


def _too_old(name: str, device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels of a backend."""
    have, need = capability(device), MINIMUM_CAPABILITY[name]
    if have >= need:
        return None
    return "the kernels need sm_{}{} or newer, this GPU is sm_{}{}".format(*need, *have)


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # it has other names, too
        version = importlib.metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
            return f"the kernels need Triton 3.6 or newer, found {version}: torch 2.10 brings one"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton runs on GPUs (TRITON_INTERPRET=1, set before the start, emulates it on CPU)"
    if device.type != "cuda":
        return f"it runs on cuda tensors, these are on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _too_old("triton", device)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(8, 6) for sm_86. Asked for each GPU, as a machine may have different ones."""
    return torch.cuda.get_device_capability(device)


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


_forced = _checked_name(os.environ.get("GLMKERN_BACKEND") or None)
