"""Calls of the CUDA ops that together run every kernel in every instance of its templates.

What holds for any kernel is tested with them in test_kernels.py; the numbers are tested with each
op, tests/ops and test_<op>.py here.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from glmkern import ops
from tests.cuda_on_host.machine import CODE_VERSION, Machine
from tests.cuda_on_host.sanitized import unaligned
from tests.ops.formulas import add_rms_norm_inputs
from tests.ops.numerics import HALF_AND_SINGLE, poisoned_memory
from tests.ops.test_rope import table

ROWS = 37  # two splits of bias_dropout's, of unequal lengths
L2_BYTES = 1 << 10
Kernels = SimpleNamespace  # torch.ops.glmkern_cuda


@dataclass(frozen=True)
class Case:
    """`call(kernels)` returns all results of one or more ops; equal inputs each time."""

    name: str
    call: Callable[[Kernels], list[Tensor]]
    variant: str | None = None  # of quant_linear
    splits: int = 0  # of its sums on tensor cores; 0: as it chooses
    code_version: int = CODE_VERSION

    def __str__(self) -> str:
        return self.name

    def run(self, kernels: Kernels, machine: Machine) -> list[Tensor]:
        """In poisoned memory, and with slabs of few rows."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(poisoned_memory())
            stack.enter_context(machine.l2_cache(L2_BYTES))
            stack.enter_context(machine.code_version(self.code_version))
            stack.enter_context(machine.splits(self.splits))
            if self.variant is not None:
                stack.enter_context(machine.variant(self.variant))
            return self.call(kernels)


def aligned(x: Tensor) -> Tensor:
    return x.clone()


def rms_norm(rows: int, hidden: int, dtype: torch.dtype, place: Callable = aligned) -> Case:
    x, residual, weight = (t.detach() for t in add_rms_norm_inputs((rows, hidden), dtype))

    def run(kernels: Kernels) -> list[Tensor]:
        args = [place(t) for t in (x, residual, weight)]
        y, h, rstd = kernels.add_rms_norm_fwd(*args, 1e-5)
        return [
            *(y, h, rstd),
            *kernels.rms_norm_fwd(args[0], args[2], 1e-5),
            *kernels.rms_norm_bwd(y, h, args[2], rstd, args[1], True),
            kernels.rms_norm_bwd(y, h, args[2], rstd, None, False)[0],
        ]

    return Case(f"rms_norm-{rows}x{hidden}-{dtype}-{place.__name__}", run)


def swiglu(rows: int, width: int, dtype: torch.dtype, place: Callable = aligned) -> Case:
    x, dy = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)

    def run(kernels: Kernels) -> list[Tensor]:
        return [kernels.swiglu_fwd(place(x)), kernels.swiglu_bwd(place(dy), place(x))]

    return Case(f"swiglu-{rows}x{width}-{dtype}-{place.__name__}", run)


def bias_dropout(
    cu_seqlens: Sequence[int], hidden: int, dtype: torch.dtype, place: Callable = aligned
) -> Case:
    """Also where cu_seqlens do not fit the rows, which a GPU does not check."""
    x, residual, dy = torch.randn(3, ROWS, hidden).to(dtype)
    bias = torch.randn(hidden).to(dtype)
    sequences = torch.tensor(cu_seqlens, dtype=torch.int32), torch.arange(len(cu_seqlens) - 1)
    drop = (0.3, torch.tensor([3, 5]), *sequences)

    def run(kernels: Kernels) -> list[Tensor]:
        args = [place(t) for t in (x, bias, residual)]
        return [
            kernels.bias_dropout_add_fwd(*args, 0.0, None, None, None),
            kernels.bias_dropout_add_fwd(args[0], None, args[2], 0.0, None, None, None),
            kernels.bias_dropout_add_fwd(*args, *drop),
            kernels.bias_dropout_add_fwd(args[0], None, args[2], *drop),
            *kernels.bias_dropout_add_bwd(place(dy), *drop, True),
            kernels.bias_dropout_add_bwd(place(dy), *drop, False)[0],
        ]

    return Case(f"bias_dropout-{cu_seqlens}x{hidden}-{dtype}-{place.__name__}", run)


RopeShape = Sequence[int]  # tokens, heads, groups, channels, pairs, interleaved


def qkv_inputs(
    shape: RopeShape, dtype: torch.dtype, table_dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """qkv, bias, table and positions; a dense qkv, unlike that of the shared tests."""
    tokens, heads, groups, channels, pairs, _ = shape
    width = (heads + 2 * groups) * channels
    angles = table(50, pairs).to(table_dtype), torch.randint(50, (tokens,))
    return [torch.randn(tokens, width).to(dtype), torch.randn(width).to(dtype), *angles]


def every_form_of_rope(
    kernels: Kernels, shape: RopeShape, inputs: Sequence[Tensor], place: Callable = aligned
) -> list[Tensor]:
    """The results of every form, with `place` between an input and the kernel."""
    _, heads, groups, channels, _, interleaved = shape
    qkv, bias, cos_sin, positions = inputs
    angles, layout = (place(cos_sin), positions), (heads, groups, interleaved)
    entries = [place(torch.zeros(len(qkv) + 2, groups, channels).to(qkv)) for _ in range(2)]
    slots = torch.arange(len(qkv) + 1, 1, -1)
    parts = kernels.qkv_rope_fwd(place(qkv), place(bias), *angles, *layout)
    q = kernels.qkv_rope_cache_fwd(place(qkv), None, *angles, *layout, *entries, slots)
    return [
        *parts,
        kernels.qkv_rope_bwd(*map(place, parts), *angles, interleaved),
        kernels.rope_fwd(place(parts[0]), *angles),
        kernels.rope_bwd(place(parts[1]), *angles),
        q,
        *entries,
    ]


def rope(
    shape: RopeShape,
    dtype: torch.dtype,
    table_dtype: torch.dtype = torch.float32,
    place: Callable = aligned,
) -> Case:
    inputs = qkv_inputs(shape, dtype, table_dtype)

    def run(kernels: Kernels) -> list[Tensor]:
        return every_form_of_rope(kernels, shape, inputs, place)

    return Case(f"rope-{shape}-{dtype}-{table_dtype}-{place.__name__}", run)


def quant_linear(
    m: int,
    n: int,
    k: int,
    bits: int,
    dtype: torch.dtype,
    variant: str,
    code_version: int = CODE_VERSION,
    place: Callable = aligned,
    splits: int = 0,
) -> Case:
    packed, scale, _ = ops.quantize(torch.randn(n, k) * 0.02, bits)
    x, dy, bias = (torch.randn(s).to(dtype) for s in ((m, k), (m, n), (n,)))

    def run(kernels: Kernels) -> list[Tensor]:
        weight = place(packed), place(scale), bits
        return [
            kernels.quant_linear_fwd(place(x), *weight, place(bias)),
            kernels.quant_linear_fwd(place(x), *weight, None),
            kernels.quant_linear_bwd(place(dy), *weight),
        ]

    how = f"{variant}-sm{code_version}-{splits}"
    name = f"quant_linear-{how}-{m}x{n}x{k}-{bits}-{dtype}-{place.__name__}"
    return Case(name, run, variant, splits, code_version)


def linear_cross_entropy(
    width: int, classes: int, dtype: torch.dtype, ignore_index: int | None, smoothing: float
) -> Case:
    hidden, weight = torch.randn(9, width).to(dtype), torch.randn(classes, width)
    packed, scale, bits = ops.quantize(weight, 4)
    labels = torch.randint(classes, (9,))
    if ignore_index is not None:
        labels[::3] = ignore_index

    def run(kernels: Kernels) -> list[Tensor]:
        results = []
        for stored in ((packed, scale, bits), (weight.to(dtype), None, 8 * dtype.itemsize)):
            more = labels, None, ignore_index, smoothing
            loss, dhidden = kernels.linear_cross_entropy_fwd(hidden, *stored, *more, True)
            results += [
                *(loss, dhidden),
                kernels.linear_cross_entropy_fwd(hidden, *stored, *more, False)[0],
                kernels.linear_cross_entropy_bwd(torch.tensor(3.0), dhidden, dtype),
            ]
        return results

    return Case(f"linear_cross_entropy-{width}x{classes}-{dtype}-{ignore_index}-{smoothing}", run)


def prefix_attention(
    shape: Sequence[int],
    dtype: torch.dtype,
    code_version: int = CODE_VERSION,
    place: Callable = aligned,
    splits: int = 0,
    prefix_dtype: torch.dtype = torch.float32,
    cu_seqlens: Sequence[int] = (0, 21, 22, 45),
) -> Case:
    """shape: heads, groups, channels, prefix. Also where cu_seqlens do not fit the tokens, which a
    GPU does not check: then without results, as tokens of no sequence have none."""
    (heads, groups, channels, prefix), tokens, rows = shape, 45, 2
    q, k, v = (torch.randn(tokens, n, channels).to(dtype) for n in (heads, groups, groups))
    prefixes = torch.randn(2, prefix, groups, channels).to(prefix_dtype)
    batch = torch.tensor(cu_seqlens, dtype=torch.int32), torch.arange(len(cu_seqlens) - 1)
    ends = cu_seqlens[0], cu_seqlens[-1]
    fits = ends == (0, tokens) and list(cu_seqlens) == sorted(cu_seqlens)
    new = torch.randn(rows, 3, heads, channels).to(dtype)
    caches = torch.randn(2, rows, tokens, groups, channels).to(dtype)
    lens, new_lens = torch.tensor([tokens, 3]), torch.tensor([3, 1])

    def run(kernels: Kernels) -> list[Tensor]:
        results = []
        args = [place(x) for x in (q, k, v, *prefixes)]
        for p in (0.0, 0.3):
            more = *batch, torch.tensor([3, 5]), 0.2, p
            forward = kernels.prefix_attention_fwd(*args, *more)
            call = place(q), *args, *forward, *more
            results += [
                *forward,
                *kernels.prefix_attention_bwd(*call, True, True),
                *kernels.prefix_attention_bwd(*call, False, True)[3:],
            ]
        for count in (1, 3):
            queries, stored = place(new[:, :count]), (place(x) for x in caches)
            decoded = kernels.prefix_attention_decode_fwd(
                queries, *stored, lens, *args[3:], new_lens.clamp(max=count), 0.2
            )
            results.append(decoded)
        return results if fits else []

    how = f"sm{code_version}-{splits}-{list(cu_seqlens)}-{prefix_dtype}"
    name = f"prefix_attention-{shape}-{dtype}-{how}-{place.__name__}"
    return Case(name, run, None, splits, code_version)


def every_case() -> Iterator[Case]:
    for dtype in HALF_AND_SINGLE:
        wide = 16 // dtype.itemsize
        # 1, 2, 4 and 8 vectors a thread, and rows longer than that; splits of one row and of nine.
        for vectors in (1, 2, 4, 8):
            yield rms_norm(1, vectors * 256 * wide - wide, dtype)
        yield rms_norm(1, 8 * 256 * wide + wide, dtype)
        yield rms_norm(9, 64 * wide, dtype)
        yield rms_norm(9, 67, dtype)
        yield rms_norm(3, 64, dtype, unaligned)
        for width in (wide, 37 * wide, 131):
            yield swiglu(3, width, dtype)
        yield swiglu(3, 64, dtype, unaligned)
        for cu_seqlens in ([0, 20, ROWS], [0, 2 * ROWS, 2], [-1, 0, 1], [5, 4, 3, 2]):
            yield bias_dropout(cu_seqlens, 37 * wide, dtype)
        yield bias_dropout([0, 1, ROWS], 131, dtype)
        yield bias_dropout([0, 1, ROWS], 64, dtype, unaligned)
        yield rope((3, 32, 2, 128, 32, False), dtype)
        yield rope((2, 5, 5, 16, 8, True), dtype, torch.float16)
        yield rope((1, 2, 1, 1104, 304, False), dtype, torch.bfloat16)
        # Single elements: odd heads, pairs that end within 16 bytes, nothing to rotate.
        for shape in ((2, 3, 3, 7, 3, True), (2, 5, 2, 16, 3, False), (3, 1, 1, 1, 0, False)):
            yield rope(shape, dtype)
        yield rope((2, 2, 2, 64, 32, True), dtype, place=unaligned)
        yield linear_cross_entropy(40, 301, dtype, -100, 0.1)
        yield linear_cross_entropy(34, 300, dtype, None, 0.0)
        for bits in (4, 8):
            yield quant_linear(7, 300, 64, bits, dtype, "slab")
            yield quant_linear(2, 37, 34, bits, dtype, "slab")
            yield quant_linear(2, 37, 32, bits, dtype, "slab", place=unaligned)
    for version, dtype, has_products in (
        *((75, torch.float16, True), (80, torch.float16, True), (80, torch.bfloat16, True)),
        *((75, torch.bfloat16, False), (80, torch.float32, False)),
    ):
        if has_products:
            yield prefix_attention((6, 2, 128, 40), dtype, version)
            yield prefix_attention((4, 2, 64, 70), dtype, version, splits=3)
        else:
            yield prefix_attention((4, 2, 40, 33), dtype, version, splits=3)
        yield prefix_attention((2, 2, 16, 8), dtype, version, prefix_dtype=dtype)
        yield prefix_attention((3, 1, 19, 33), dtype, version, unaligned, 1, dtype)
        for cu_seqlens in ([0, 90, 3], [-1, 0, 1], [5, 4, 3, 2]):
            yield prefix_attention((4, 2, 16, 8), dtype, version, cu_seqlens=cu_seqlens)
        yield prefix_attention((3, 1, 16, 8), dtype, version, splits=9, cu_seqlens=[40, 41, 45])
    yield prefix_attention((1, 1, 136, 5), torch.float16)
    for bits in (4, 8):
        for m in (1, 2, 4, 8):
            yield quant_linear(m, 600, 1088, bits, torch.float32, "gemv")
            yield quant_linear(m, 600, 34, bits, torch.float32, "gemv")
        for version, dtype in ((75, torch.float16), (80, torch.float16), (80, torch.bfloat16)):
            # Every tile, two blocks beside each other, sums that are split and that are not.
            for splits, m, n, k in (
                (0, 7, 40, 1056),
                (2, 15, 264, 608),
                (0, 31, 136, 288),
                (3, 70, 392, 416),
                (2, 2, 130, 288),
            ):
                yield quant_linear(m, n, k, bits, dtype, "mma", version, splits=splits)
            yield quant_linear(20, 37, 70, bits, dtype, "mma", version)
            yield quant_linear(3, 150, 1034, bits, dtype, "mma", version, unaligned, 2)
