"""A GPU without data: what a model launches there, and where the host would wait for it.

Its tensors are torch's meta tensors, shapes and dtypes without memory; the CPU's are the host's.
glmkern's ops run their Triton implementations up to the launch, which is written down instead.

    with fake_gpu() as gpu:
        model = ...                      # on DEVICE
        with gpu.recording() as events:
            model.loss(batch)
        launches(events), host_reads(events)

A `read` makes the host wait for the GPU: a value is read back, or a shape depends on values. A
`copy` moves data from the host. Neither may stand in a CUDA graph.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.triton_cases import Launch
from glmkern import dispatch

DEVICE = "meta"
# Of the chip that tiles and slabs are chosen for, if no other is asked for: an H100.
SHARED_KIB, L2_BYTES = 227, 50 * 2**20
LAUNCH, READ, COPY = "launch", "read", "copy"
# They wait for the GPU: a value goes to the host, decides a shape, or is checked there.
READS = frozenset(
    "_local_scalar_dense item nonzero masked_select is_nonzero equal multinomial bincount _unique2 "
    "unique_dim unique_consecutive allclose".split()
)
# They make a tensor, or another view of one, and launch nothing.
FREE = frozenset(
    "empty empty_like new_empty empty_strided new_empty_strided detach _unsafe_view lift_fresh "
    "alias device set_ resize_ _reshape_alias record_stream".split()
)

_tensor = torch.tensor


@dataclass(frozen=True)
class Event:
    """Something that the host asked of the GPU: `kind` is launch, read or copy.

    call: of a Triton kernel, what starts it; of an op of torch, None.
    bytes: of all tensors that it reads and writes; flops: of a matrix product of torch.
    """

    kind: str
    name: str
    call: "Call | None" = None
    bytes: int = 0
    flops: int = 0


class Call(NamedTuple):
    """A launch of a Triton kernel: its programs along each axis, and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """An argument or a constant."""
        if name in self.constants:
            return self.constants[name]
        return self.args[self.kernel.arg_names.index(name)]

    @property
    def specialisation(self) -> tuple:
        """What Triton's launcher looks at: calls with one have one compiled kernel."""
        kinds = tuple(
            x.dtype if isinstance(x, Tensor) else (x == 1, x % 16 == 0) if type(x) is int else x
            for x in self.args
        )
        constants = tuple(sorted(self.constants.items(), key=str))
        return self.kernel.__name__, kinds, self.num_warps, self.num_stages, constants

    def to_compile(self) -> Launch:
        return Launch("", self.kernel, self.args, self.num_warps, self.num_stages, self.constants)


def launches(events: Sequence[Event]) -> Counter[str]:
    """How often each kernel, or op of torch, was launched."""
    return Counter(event.name for event in events if event.kind == LAUNCH)


def host_reads(events: Sequence[Event]) -> list[str]:
    return [event.name for event in events if event.kind == READ]


def host_copies(events: Sequence[Event]) -> list[str]:
    return [event.name for event in events if event.kind == COPY]


@dataclass
class FakeGpu:
    """`found`: how many elements a search on the GPU is taken to find."""

    found: int = 1
    events: list[Event] = field(default_factory=list)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Event]]:
        """The events of this block, in the order in which the host asked for them."""
        start, block = len(self.events), []
        yield block
        block.extend(self.events[start:])

    def tensor(self, data: Any, **options: Any) -> Tensor:
        """torch.tensor, which would make a meta tensor without a copy from the host."""
        return _tensor(data, **options | {"device": "cpu"}).to(options.get("device", "cpu"))

    def launch(
        self,
        kernel: Any,
        programs: Any,
        *args: Any,
        num_warps: int,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        """In the place of triton_kernels.launch.launch."""
        grid = programs if isinstance(programs, tuple) else (programs,)
        if 0 not in grid:
            call = Call(kernel, grid, args, num_warps, num_stages, constants)
            name = kernel.__name__.removesuffix("_kernel")
            self.events.append(Event(LAUNCH, name, call, _bytes_of(args)))


class _Recorder(TorchDispatchMode):
    """Writes down every op that reaches the GPU; ours go to their Triton implementations."""

    def __init__(self, gpu: FakeGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "glmkern" and inputs[0].is_meta:
            implementation = dispatch._load_implementation(
                dispatch.OPS[name], "triton", inputs[0].device
            )
            with self:  # what it does itself counts too
                return implementation(*args, **kwargs)
        if any(x.is_meta for x in inputs) and (name in READS or _indexed_by_bools(name, args)):
            self.gpu.events.append(Event(READ, name))
            return self._stand_in(name, args)
        if name in ("_to_copy", "copy_") and _target_is_host(name, args, kwargs):
            self.gpu.events.append(Event(READ, f"{name} to the host"))
            return (
                torch.zeros(args[0].shape, dtype=args[0].dtype) if name == "_to_copy" else args[0]
            )
        result = func(*args, **kwargs)
        if any(x.is_meta for x in tree_leaves(result) if isinstance(x, Tensor)):
            self.gpu.events += self._events(func, name, inputs, tree_leaves(result))
        return result

    def _events(self, func, name: str, inputs: list[Tensor], results: list) -> Iterator[Event]:
        from_host = any(x.device.type == "cpu" and x.dim() > 0 for x in inputs)
        if from_host:
            yield Event(COPY, name)
        elif name not in FREE and not _is_view(func) and any(x.numel() for x in results):
            moved = _bytes_of(inputs) + _bytes_of(results)
            yield Event(LAUNCH, name.strip("_"), None, moved, _product_flops(name, inputs))

    def _stand_in(self, name: str, args: Sequence[Any]) -> Any:
        """What a read might have found."""
        if name in ("_local_scalar_dense", "item"):
            return 1.0 if args[0].is_floating_point() else 1
        if name == "nonzero":
            return args[0].new_empty(self.gpu.found, args[0].dim(), dtype=torch.int64)
        if name == "index":
            return args[0].new_empty(self.gpu.found, *args[0].shape[1:])
        if name == "multinomial":
            return args[0].new_empty(len(args[0]), args[1], dtype=torch.int64)
        if name in ("equal", "is_nonzero", "allclose"):
            return True
        raise NotImplementedError(f"{name} on a GPU without data")


def _bytes_of(values: Sequence[Any]) -> int:
    return sum(x.nbytes for x in values if isinstance(x, Tensor))


def _product_flops(name: str, inputs: Sequence[Tensor]) -> int:
    """Of a matrix product of torch: twice rows x columns x depth."""
    if name in ("mm", "matmul"):
        a, b = inputs[0], inputs[1]
    elif name == "linear":
        a, b = inputs[0], inputs[1].T
    elif name == "addmm":
        a, b = inputs[1], inputs[2]
    else:
        return 0
    return 2 * a.numel() * b.shape[-1]


def _is_view(func) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _target_is_host(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a copy goes from the GPU to the host."""
    source = args[1] if name == "copy_" else args[0]
    target = args[0].device if name == "copy_" else kwargs.get("device")
    return source.is_meta and target is not None and torch.device(target).type == "cpu"


def _indexed_by_bools(name: str, args: Sequence[Any]) -> bool:
    """x[mask] asks how many there are."""
    indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
    return indexes and any(x is not None and x.dtype == torch.bool for x in args[1])


@contextlib.contextmanager
def fake_gpu(
    found: int = 1, shared_kib: int = SHARED_KIB, l2_bytes: int = L2_BYTES
) -> Iterator[FakeGpu]:
    """Records what is done to tensors on DEVICE, a chip with so much shared memory a block and so
    large an L2 cache."""
    gpu = FakeGpu(found)
    for op in dispatch.OPS.values():  # loads every module that launches
        dispatch._load_implementation(op, "triton", torch.device(DEVICE))
    launchers = [
        module
        for name, module in sys.modules.items()
        if name.startswith("glmkern.triton_kernels.") and name != "glmkern.triton_kernels.launch"
    ]
    with contextlib.ExitStack() as stack:
        for module in launchers:
            for name, value in (
                ("launch", gpu.launch),
                ("shared_memory_kib", lambda device: shared_kib),
                ("l2_bytes", lambda device: l2_bytes),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        # it does not know this device
        stack.enter_context(
            mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        )
        stack.enter_context(mock.patch.object(torch, "tensor", gpu.tensor))
        stack.enter_context(_Recorder(gpu))
        yield gpu
