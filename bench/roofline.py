"""What this machine can do, measured: copy bandwidth and matrix multiplication rate.

    python -m bench.roofline

Every benchmark measures these in its own run, between its own calls: a shared machine's speed
changes by the minute, and the datasheet's is never reached. T_roof of a piece of work is
max(bytes / bandwidth, flops / rate).
"""

import itertools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.clock import ROUNDS, seconds_per_round
from glmkern import dispatch

# 24 MB a tensor on a CPU: past the last-level caches of small machines, and below 32 MB. From there
# on malloc maps fresh pages for every result; their faults would swamp what is measured. 256 MB a
# tensor on a GPU: past every L2 cache.
COPY_SHAPE = {"cpu": (1500, 4096), "cuda": (16384, 4096)}
# Sets of such tensors that take turns; a GPU's caches are cleared instead.
COPIES = {"cpu": 4, "cuda": 1}
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Probe:
    """A call that does nothing but move `bytes`, or compute `flops`."""

    name: str
    bytes: int
    flops: int
    call: Callable[[], object]


def in_turn(calls: Sequence[Callable]) -> Callable:
    """Calls the next of `calls` every time: the same work on tensors that no cache holds.

    Together they must have more bytes than the last-level cache. A cache that holds half of a
    tensor would favour the implementation that touches the fewest.
    """
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copy_probe(device: str) -> Probe:
    """`copy_` of one float32 tensor into an existing one: one read and one write."""

    def copy() -> Callable:
        source = torch.randn(COPY_SHAPE[device], device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    rows, columns = COPY_SHAPE[device]
    calls = [copy() for _ in range(COPIES[device])]
    return Probe("copy", 2 * 4 * rows * columns, 0, in_turn(calls))


def gemm_probe(device: str, dtype: torch.dtype = torch.float32) -> Probe:
    """A square matrix product into an existing tensor, accumulated in float32."""
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Probe("gemm", 0, 2 * size**3, lambda: torch.mm(a, b, out=out))


def machine(device: str) -> dict[str, str]:
    """The machine in the words a results table needs."""
    words = {"torch": torch.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return words | {
            "gpu": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": torch.version.cuda,
        }
    return words | {
        "cpu": _cpu_model(),
        "threads": str(torch.get_num_threads()),
        "torch's instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels'": torch.ops.glmkern_cpu.isa() if _has_cpu_kernels() else "none",
        **{name: os.environ[name] for name in ("MKL_ENABLE_INSTRUCTIONS",) if name in os.environ},
    }


def _has_cpu_kernels() -> bool:
    return dispatch.why_unavailable("cpu", "cpu") is None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probes = [copy_probe(device), gemm_probe(device)]
    copy, gemm = (
        torch.tensor(t).median().item()
        for t in seconds_per_round([p.call for p in probes], device, ROUNDS)
    )
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
    print(
        f"copy {probes[0].bytes / copy / 1e9:.1f} GB/s, "
        f"float32 matrix product {probes[1].flops / gemm / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
