"""Where the time of a piece of work goes on a GPU: kernels by their time, launches, gaps, host."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

NAME_COLUMNS, HOST_ROWS = 90, 25
# CUPTI before CUDA 13.1 may lose the first launches of a session (pytorch issue 192021): these come
# before those that count, and as long as one is seen, none is lost after it.
MARKERS, MARKER_CYCLES, MARKER_KERNEL = 64, 100_000, "spin_kernel"


@dataclass
class Profile:
    """Microseconds of every launch by the kernel's name, and of the whole from end to end."""

    kernels: dict[str, list[float]] = field(default_factory=dict)
    wall_ms: float = 0.0
    host_table: str = ""

    @property
    def copies(self) -> int:
        return sum(len(v) for k, v in self.kernels.items() if k.startswith(("Memcpy", "Memset")))

    @property
    def launches(self) -> int:
        """Of kernels, copies left out."""
        return sum(map(len, self.kernels.values())) - self.copies

    @property
    def busy_ms(self) -> float:
        return sum(map(sum, self.kernels.values())) / 1e3

    def as_row(self) -> dict:
        return {
            "launches": self.launches,
            "copies": self.copies,
            "busy_ms": round(self.busy_ms, 3),
            "wall_ms_profiled": round(self.wall_ms, 2),
        }

    def append_to(self, path: Path, title: str) -> None:
        """The kernels, the most expensive first, and the host's functions."""
        lines = [
            f"{sum(times) / 1e3:9.3f} ms {len(times):6d} x {median(times):9.1f} us  "
            f"{name[:NAME_COLUMNS]}"
            for name, times in sorted(self.kernels.items(), key=lambda item: -sum(item[1]))
        ]
        with path.open("a") as file:
            file.write("\n".join([f"== {title}", *lines, "", self.host_table, ""]))


def profile(call: Callable[[], object], device: str) -> Profile:
    """RuntimeError where the profiler has lost some of the launches."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    found = Profile()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(MARKERS if device == "cuda" else 0):
            torch.cuda._sleep(MARKER_CYCLES)
        found.wall_ms = seconds_of(call, device) * 1e3
    on_gpu = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    if device == "cuda":
        on_gpu = after_markers(on_gpu)
    for event in on_gpu:
        found.kernels.setdefault(event.name, []).append(event.device_time_total)
    found.host_table = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=HOST_ROWS
    )
    return found


def after_markers(events: Sequence[Any]) -> list[Any]:
    """Of the events of a GPU those after the last marker, in their order."""
    ordered = sorted(events, key=lambda event: event.time_range.start)
    last = max((i for i, event in enumerate(ordered) if MARKER_KERNEL in event.name), default=None)
    if last is None or last == len(ordered) - 1:
        raise RuntimeError(f"the profiler lost launches: of {len(ordered)} none is left to count")
    return ordered[last + 1 :]


def seconds_of(call: Callable[[], object], device: str) -> float:
    """From an idle GPU to an idle GPU."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
