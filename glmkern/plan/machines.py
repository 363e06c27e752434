"""What a run is planned for: a GPU by name, from public data sheets, or this machine, measured."""

import difflib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from glmkern.errors import InputError

GIB = 2**30
# Libraries and context of a process on a GPU, which no allocator counts.
GPU_CONTEXT = int(0.6 * GIB)
# Resident memory of Python, torch and this package, and of what torch's optimisers import.
PROCESS, OPTIMISER = 224 * 2**20, 147 * 2**20
# Assumed shares of the data sheet's rate, and of the rate of matrix products measured here. That of
# a CPU is the middle of the training steps in bench/results (docs/plan.md).
GPU_SHARE_OF_DATA_SHEET, GPU_SHARE_OF_PRODUCT, CPU_SHARE_OF_PRODUCT = 0.5, 0.7, 1.1
GPU_SHARE_OF_BANDWIDTH = 0.8
PROBE_SIZE = {"cpu": 1536, "cuda": 8192}
PROBE_BYTES = {"cpu": 2**26, "cuda": 2**30}


class DataSheet(NamedTuple):
    """What its maker says of a GPU, of one with variants the SXM one.

    gib: memory, less a sixteenth where ECC takes that; half and single: TFLOP/s, of dense float16
    products with float32 sums in tensor cores, and of float32; bandwidth: GB/s; capability: sm_NN.
    """

    name: str
    gib: float
    half: float
    single: float
    bandwidth: float
    capability: int


GPUS = {
    each.name: each
    for each in (
        DataSheet("V100 16GB", 16, 125, 15.7, 900, 70),
        DataSheet("V100 32GB", 32, 125, 15.7, 900, 70),
        DataSheet("T4", 15, 65, 8.1, 320, 75),
        DataSheet("RTX 2080 Ti", 11, 53.8, 13.4, 616, 75),
        DataSheet("RTX 3060 12GB", 12, 25.5, 12.7, 360, 86),
        DataSheet("RTX 3080 10GB", 10, 59.5, 29.8, 760, 86),
        DataSheet("RTX 3090", 24, 71, 35.6, 936, 86),
        DataSheet("RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288, 89),
        DataSheet("RTX 4070", 12, 58.3, 29.1, 504, 89),
        DataSheet("RTX 4080", 16, 97.5, 48.7, 717, 89),
        DataSheet("RTX 4090", 24, 165.2, 82.6, 1008, 89),
        DataSheet("RTX 5090", 32, 209.5, 104.8, 1792, 120),
        DataSheet("A10", 22.5, 125, 31.2, 600, 86),
        DataSheet("A100 40GB", 40, 312, 19.5, 1555, 80),
        DataSheet("A100 80GB", 80, 312, 19.5, 2039, 80),
        DataSheet("L4", 22.5, 121, 30.3, 300, 89),
        DataSheet("L40S", 45, 362, 91.6, 864, 89),
        DataSheet("H100", 80, 989, 67, 3350, 90),
        DataSheet("H200", 140, 989, 67, 4800, 90),
    )
}


@dataclass(frozen=True)
class Machine:
    """Where a run is computed.

    name: with where the numbers come from.
    device: "cpu" or "cuda".
    memory: bytes that a run may take in all, `overhead` included; 0 where that is not known.
    overhead: bytes that it takes beside tensors: the process, or a GPU's context.
    flops, bandwidth: a second, those that a training step is assumed to reach.
    assumption: how these follow from the data sheet, or from what was measured, in words.
    note: what else a user should know; "" for nothing.
    """

    name: str
    device: str
    memory: int
    overhead: int
    flops: float
    bandwidth: float
    assumption: str
    note: str = ""


def named_gpu(name: str, dtype: str) -> Machine:
    """A GPU of the table, computing in `dtype` ("float32", "float16" or "bfloat16").

    Spaces, case and the makers' words do not matter. Raises InputError, listing the known names,
    for any other.
    """
    sheet = {_plain(each): GPUS[each] for each in GPUS}.get(_plain(name))
    if sheet is None:
        near = difflib.get_close_matches(_plain(name), map(_plain, GPUS), n=1, cutoff=0.6)
        hint = f" (nearest: {next(g for g in GPUS if _plain(g) == near[0])})" if near else ""
        raise InputError(f"--gpu {name} is not in the table{hint}; known are {', '.join(GPUS)}")
    old = sheet.capability < 80
    single = dtype == "float32" or (dtype == "bfloat16" and old)
    rate = sheet.single if single else sheet.half
    return Machine(
        f"{sheet.name} (data sheet: {sheet.gib:g} GiB, {rate:g} TFLOP/s in {dtype}, "
        f"{sheet.bandwidth:g} GB/s)",
        "cuda",
        int(sheet.gib * GIB),
        GPU_CONTEXT,
        rate * 1e12 * GPU_SHARE_OF_DATA_SHEET,
        sheet.bandwidth * 1e9 * GPU_SHARE_OF_BANDWIDTH,
        f"{GPU_SHARE_OF_DATA_SHEET:.0%} of the data sheet's rate, "
        f"{GPU_SHARE_OF_BANDWIDTH:.0%} of its bandwidth",
        _note(sheet.capability, dtype),
    )


def _note(capability: int, dtype: str) -> str:
    if capability >= 80:
        return ""
    if capability < 75:
        return (
            f"sm_{capability}: the kernels need sm_75, so PyTorch's own ops run, slower and with "
            "more memory than predicted"
        )
    if dtype == "bfloat16":
        return f"sm_{capability}: no products of bfloat16; --fp16 is eight times as fast"
    return f"sm_{capability}: the CUDA C++ kernels run; Triton's need sm_80"


def _plain(name: str) -> str:
    """Of a GPU's name, what tells it from others."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(w for w in words if w not in ("nvidia", "geforce", "tesla"))


@functools.cache
def this_machine(device: str, dtype: str, sharing: int = 1) -> Machine:
    """This machine's CPU or GPU ("cpu", "cuda", "cuda:1"), from matrix products and reads that
    take less than a second; of a CPU's free memory the part of one of `sharing` processes."""
    import torch

    kind = device.partition(":")[0]
    rate, bandwidth = _product_rate(device, kind, dtype), _read_rate(device, kind)
    share = CPU_SHARE_OF_PRODUCT if kind == "cpu" else GPU_SHARE_OF_PRODUCT
    if kind == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is what will be compared
        memory, _ = torch.cuda.mem_get_info(device)
        name, overhead = torch.cuda.get_device_name(device), 0
        words = f"{memory / GIB:.1f} GiB free"
    else:
        resident, available = resident_bytes(), available_bytes()
        memory = available // sharing + resident if available else 0
        overhead = max(PROCESS, resident) + OPTIMISER
        name, words = "this CPU", f"{torch.get_num_threads()} threads, {memory / GIB:.1f} GiB free"
        if sharing > 1:
            words += f" for each of {sharing} processes"
    return Machine(
        f"{name} (measured: {words}, {rate / 1e9:,.0f} GFLOP/s in {dtype} products, "
        f"{bandwidth / 1e9:.0f} GB/s read)",
        kind,
        memory,
        overhead,
        rate * share,
        bandwidth,
        f"{share:.0%} of the measured rate of products",
    )


def _product_rate(device: str, kind: str, dtype: str) -> float:
    """Floating point operations a second of a square matrix product."""
    import torch

    size = PROBE_SIZE[kind]
    # A generator of its own: the run's random numbers do not depend on being predicted.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.rand(2, size, size, generator=generator, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _read_rate(device: str, kind: str) -> float:
    """Bytes a second of adding up a tensor that few caches hold."""
    import torch

    numbers = torch.ones(PROBE_BYTES[kind] // 4, device=device)
    return numbers.nbytes / _seconds(numbers.sum, device)


def _seconds(call: Callable[[], object], device: str) -> float:
    """The fastest of four calls after a first one: other processes only add time."""
    import torch

    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def resident_bytes() -> int:
    """Memory of this process, as far as it lies in RAM; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return _kib_of(status, "VmRSS")
    except OSError:
        return 0


def available_bytes() -> int:
    """RAM that is free, or would be on demand; 0 where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as meminfo:
            return _kib_of(meminfo, "MemAvailable")
    except OSError:
        return 0


def _kib_of(lines, name: str) -> int:
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
