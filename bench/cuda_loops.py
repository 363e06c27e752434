"""What the loops of the compiled CUDA C++ kernels do, and whether memory or instructions bind them.

    python -m bench.cuda_loops                                     a line an instance
    python -m bench.cuda_loops --kernel "rope.*half" --gpu T4      these instances, their loops too

Needs no GPU, but nvcc: kernels are compiled as bench/cuda_binaries.py does it, and bench/sass.py
says what of a loop is counted. What a branch can skip counts. A kernel of which no loop accesses
global memory or multiplies matrices is looked at as a whole, as if every instruction ran once.

For code without products of tensor cores, the shares say how long its instructions take beside the
bytes that it moves, at the data sheet's bandwidth: under 100 % memory is the bound. They are those
of the issue slots and of the busiest unit; xu has the transcendental functions and conversions
(NVIDIA's profiling guide for Nsight Compute). Bytes from caches count as moved. All of it is
predicted.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.cuda_binaries import Instance, instances
from bench.model_gpu import NAMED, Gpu
from bench.sass import MUFU_LANES, Kernel, Loop, as_text, kernel_of

# Their clocks and multiprocessors: bench/model_gpu.py; bandwidths: glmkern/plan/machines.py.
GPUS = {name: NAMED[name] for name in ("T4", "RTX 3060 12GB", "RTX 4090", "A100 80GB", "H100")}


class Share(NamedTuple):
    """The time of a unit over the time that memory takes for the same code; 1 is a tie."""

    issue: float
    unit: str  # the busiest other one
    busiest: float

    def __str__(self) -> str:
        return f"{self.issue:.0%}, {self.unit} {self.busiest:.0%}"


def regions(kernel: Kernel) -> list[Loop]:
    """The code that does the kernel's work: loops that access global memory or have products, or
    all of it where there are none."""
    return [loop for loop in kernel.loops if loop.global_bytes or loop.fmas] or [kernel.whole]


def hottest(kernel: Kernel) -> Loop:
    """That with most products, or else the longest; not a loop around those that do the work."""
    found = regions(kernel)
    working = [loop for loop in found if not _is_around(loop, found)]
    return max(working, key=lambda loop: (loop.fmas, loop.instructions))


def _is_around(outer: Loop, loops: Sequence[Loop]) -> bool:
    """Whether a loop stores nothing and has one inside that does."""
    return not outer.stores and any(
        loop.stores and outer.begin <= loop.begin and loop.end <= outer.end for loop in loops
    )


def share_of(loop: Loop, gpu: Gpu) -> Share | None:
    """None for products, and for code that accesses no global memory."""
    if loop.fmas or not loop.global_bytes:
        return None
    cycles = loop.cycles(gpu.sheet.capability)
    converting = loop.warps * loop.kinds["convert"] * 32 / MUFU_LANES
    cycles["xu"] = cycles.pop("mufu") + converting
    bytes_a_cycle = gpu.sheet.bandwidth * 1e9 / gpu.cycles  # for one multiprocessor
    memory = loop.warps * loop.global_bytes / bytes_a_cycle
    issue = cycles.pop("issue")
    unit = max(cycles, key=lambda name: cycles[name])
    return Share(issue / memory, unit, cycles[unit] / memory)


def compiled(pattern: str, gpus: Sequence[str]) -> Iterator[tuple[Instance, str, Kernel]]:
    """Instances whose name `pattern` is found in, with each GPU's name and their code for it."""
    by_sm = {GPUS[name].sheet.capability: name for name in gpus}
    for instance in instances(list(by_sm)):
        if re.search(pattern, instance.name):
            kernel = kernel_of(instance.sass, instance.warps, guards=True)
            yield instance, by_sm[instance.chip.sm], kernel


def as_details(instance: Instance, gpu: str, kernel: Kernel) -> str:
    """Every loop, and what it is bound by."""
    sm = instance.chip.sm
    lines = [f"\n{instance.name}: {gpu}, sm_{sm}, {instance.warps} warps"]
    outside = regions(kernel) == [kernel.whole]
    for loop in [*kernel.loops, *([kernel.whole] if outside else [])]:
        lines.append(("  the whole kernel" if loop is kernel.whole else "") + as_text(loop, sm))
        share = share_of(loop, GPUS[gpu])
        if share is not None:
            each = loop.instructions / loop.global_bytes
            lines.append(
                f"    {loop.global_bytes} bytes a warp, {each:.3f} instructions a byte: "
                f"issue slots {share} of memory's time"
            )
    return "\n".join(lines)


def as_cell(kernel: Kernel, gpu: Gpu) -> str:
    loop = hottest(kernel)
    if loop.fmas:
        return "tensor cores {:.0%}, in turn {:.0%}".format(*loop.fractions(gpu.sheet.capability))
    return str(share_of(loop, gpu) or "no access")


def as_table(found: Sequence[tuple[Instance, str, Kernel]], gpus: Sequence[str]) -> str:
    """The hottest loop of each instance."""
    cells: dict[str, list[str]] = {}
    for instance, gpu, kernel in found:
        row = cells.setdefault(f"{instance.file}: {instance.name}", [])
        row.append(as_cell(kernel, GPUS[gpu]))
    by_sm = sorted(gpus, key=lambda name: GPUS[name].sheet.capability)
    lines = [("of the time of memory: issue slots, busiest unit", *by_sm)]
    lines += [(name, *row) for name, row in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="regular expression that is in the instance's name")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    args = parser.parse_args()
    found = list(compiled(args.kernel or "", args.gpu))
    if args.kernel is not None:
        print("\n".join(as_details(*one) for one in found), end="\n\n")
    print(as_table(found, args.gpu))


if __name__ == "__main__":
    main()
