"""What the loops of the compiled Triton kernels do: instructions by kind, and the bound they imply.

    python -m bench.triton_loops                                every launch of bench/triton_cases
    python -m bench.triton_loops --op OP --sm 90 --launch fwd   those whose label has "fwd"
    python -m bench.triton_loops --json F                       writes F instead of printing

Needs no GPU: each launch is compiled as bench/triton_resources.py does it and disassembled by
`cuobjdump`. A loop is what lies between a backward branch and its target, without the loops inside
it. For one iteration of one block, alone on a multiprocessor, it prints the cycles that each unit
needs. Two predictions of the tensor cores' rate follow: as if everything overlapped, and as if
products and the rest took turns. Products that warps make twice count twice. Latencies, bank
conflicts and waiting for memory are not in them.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import triton

from bench import triton_cases
from bench.triton_cases import Launch
from bench.triton_resources import CHIPS, Chip, compile_for, cuobjdump

# Multiply-adds of fp16 or bf16 with fp32 sums that a multiprocessor's tensor cores start in a
# cycle. NVIDIA's white papers on A100, GA102, Ada, H100, Blackwell and RTX Blackwell: dense TFLOPS
# over 2 x multiprocessors x boost clock. sm_86, 89 and 120 are GeForce chips (RTX 3090, 4090,
# 5090); the same chips on professional cards do twice as many.
TENSOR_FMAS = {80: 1024, 86: 256, 89: 256, 90: 2048, 100: 4096, 120: 256}
# Lanes of a multiprocessor: table "throughput of native arithmetic instructions" of the CUDA C++
# programming guide. Additions, multiplications and fma; comparisons, logic and integers; and ex2.
FMA_LANES = {80: 64, 86: 128, 89: 128, 90: 128, 100: 128, 120: 128}
ALU_LANES, MUFU_LANES = 64, 16
SHARED_BYTES = 128  # a cycle
QUARTERS = 4  # of a multiprocessor; each issues one instruction a cycle

LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)"
    r"([^;]*);",
    re.MULTILINE,
)
# Kinds by the beginning of an opcode, the first that fits.
KINDS = (
    ("alu", ("F2FP", "I2FP")),
    (
        "tensor",
        (
            "HMMA",
            "HGMMA",
            "IMMA",
            "IGMMA",
            "QMMA",
            "QGMMA",
            "OMMA",
            "DMMA",
            "UTCHMMA",
            "UTCQMMA",
            "UTCIMMA",
        ),
    ),
    ("mufu", ("MUFU",)),
    ("convert", ("F2F", "I2F", "F2I", "I2I", "FRND")),
    ("shuffle", ("SHFL", "MOVM", "REDUX")),
    ("local", ("LDL", "STL")),
    (
        "wait",
        (
            "BAR",
            "DEPBAR",
            "LDGDEPBAR",
            "WARPGROUP",
            "WARPSYNC",
            "SYNCS",
            "MEMBAR",
            "FENCE",
            "ERRBAR",
            "CCTL",
            "UTCBAR",
            "ARRIVES",
            "NOP",
            "YIELD",
            "NANOSLEEP",
            "ELECT",
        ),
    ),
    ("copy", ("LDGSTS", "UTMA", "UBLKCP")),
    ("shared", ("LDS", "STS", "ATOMS", "LDTM", "STTM", "LDT", "STT")),
    ("global", ("LDG", "STG", "ATOMG", "RED")),
    ("branch", ("BRA", "BRX", "BSSY", "BSYNC", "BREAK", "EXIT", "CALL", "RET", "JMP", "BMOV")),
    ("fma", ("FADD", "FMUL", "FFMA", "HADD", "HMUL", "HFMA", "IMAD", "IDP")),
    ("uniform", ("U", "R2UR", "S2UR", "LDC", "VOTEU")),
    ("alu", ("",)),
)


@dataclass
class Loop:
    """Instructions that each of `warps` warps issues in one iteration."""

    begin: int
    end: int
    warps: int
    kinds: Counter = field(default_factory=Counter)
    products: Counter = field(default_factory=Counter)  # opcodes of tensor cores, with their shapes
    loads: Counter = field(default_factory=Counter)  # bits a lane takes from global memory
    stores: Counter = field(default_factory=Counter)
    shared_bytes: int = 0  # a warp
    fmas: int = 0  # a warp, by tensor cores
    drains: int = 0  # waits for products in flight
    skipped: int = 0  # not counted: a branch can skip them

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    def cycles(self, sm: int) -> dict[str, float]:
        """Of each unit, for the whole block."""

        def on(lanes: int, kind: str) -> float:
            return self.warps * self.kinds[kind] * 32 / lanes

        return {
            "tensor": self.warps * self.fmas / TENSOR_FMAS[sm],
            "issue": self.warps * self.instructions / QUARTERS,
            "fma": on(FMA_LANES[sm], "fma"),
            "alu": on(ALU_LANES, "alu"),
            "mufu": on(MUFU_LANES, "mufu"),
            "shared": self.warps * self.shared_bytes / SHARED_BYTES,
        }

    def fractions(self, sm: int) -> tuple[float, float]:
        """Of the tensor cores' rate: with everything overlapped, and with products, which read
        shared memory as they run, and the rest in turn."""
        cycles = self.cycles(sm)
        products = max(cycles["tensor"], cycles["shared"])
        rest = max(cycles[unit] for unit in ("issue", "fma", "alu", "mufu"))
        return cycles["tensor"] / max(products, rest), cycles["tensor"] / (products + rest)

    def count(self, opcode: str, suffixes: list[str], operands: str) -> None:
        kind = kind_of(opcode)
        self.kinds[kind] += 1
        width = int(next((s for s in reversed(suffixes) if s in {"64", "128"}), 32))
        if any(s in {"U8", "S8"} for s in suffixes):
            width = 8
        elif any(s in {"U16", "S16"} for s in suffixes):
            width = 16
        self.drains += (opcode, suffixes[:1]) == ("WARPGROUP", ["DEPBAR"])
        if kind == "tensor":
            self.products[".".join([opcode, *suffixes])] += 1
            self.fmas += fmas_of(opcode, suffixes)
            self.shared_bytes += operand_bytes(opcode, suffixes, operands)
        elif opcode.startswith("LDG") and kind != "wait":
            self.loads[width] += 1
            self.shared_bytes += 4 * width * (kind == "copy")
        elif kind == "global":
            self.stores[width] += 1
        elif opcode in {"LDSM", "STSM"}:
            self.shared_bytes += 128 * int(suffixes[-1] if suffixes[-1] in {"2", "4"} else 1)
        elif kind == "shared" and operands.split("[")[0].strip() != "RZ,":
            self.shared_bytes += 4 * width


def kind_of(opcode: str) -> str:
    return next(kind for kind, starts in KINDS if opcode.startswith(starts))


def shape_of(opcode: str, suffixes: list[str]) -> tuple[int, int, int] | None:
    """Rows, columns and depth of the product of one instruction, where its name says them."""
    if opcode == "HGMMA":
        rows, columns, depth = map(int, suffixes[0].split("x"))
        return rows, columns, depth
    if opcode == "HMMA":
        return 16, 8, int(suffixes[0].removeprefix("168"))
    return None


def fmas_of(opcode: str, suffixes: list[str]) -> int:
    """Of one warp: four share an HGMMA. 0 where a descriptor holds the shape (sm_100's UTCHMMA)."""
    shape = shape_of(opcode, suffixes)
    if shape is None:
        return 0
    rows, columns, depth = shape
    return rows * columns * depth // (4 if opcode == "HGMMA" else 1)


def operand_bytes(opcode: str, suffixes: list[str], operands: str) -> int:
    """Bytes of half-precision operands that one warp's share of an HGMMA takes from shared memory:
    the second factor's always, the first's unless it is in registers."""
    if opcode != "HGMMA":
        return 0
    rows, columns, depth = shape_of(opcode, suffixes)
    first = operands.split(",")[1].strip()
    return 2 * depth * (columns + rows * first.startswith("gdesc")) // 4


class Kernel(NamedTuple):
    whole: Loop  # all of its code, as if it ran once
    loops: list[Loop]  # in the order of the code, an outer one without those inside it


def kernel_of(sass: str, warps: int) -> Kernel:
    lines = [
        (int(address, 16), opcode, suffixes.split(".")[1:], operands)
        for address, opcode, suffixes, operands in LINE.findall(sass)
    ]
    ends, skips = {}, []
    for address, opcode, _, operands in lines:
        target = re.search(r"\b0x([0-9a-f]+)(?!\S)", operands)
        if opcode != "BRA" or not target:
            continue
        target = int(target[1], 16)
        if target < address:
            ends[target] = max(address, ends.get(target, 0))
        elif not any(address < at < target and kind_of(name) == "tensor" for at, name, *_ in lines):
            skips.append((address, target))
    whole = Loop(lines[0][0], lines[-1][0], warps)
    loops = [Loop(begin, end, warps) for begin, end in sorted(ends.items())]
    for address, opcode, suffixes, operands in lines:
        whole.count(opcode, suffixes, operands)
        around = [loop for loop in loops if loop.begin <= address <= loop.end]
        if not around:
            continue
        loop = min(around, key=lambda loop: loop.end - loop.begin)
        if any(loop.begin <= branch < address < target <= loop.end for branch, target in skips):
            loop.skipped += 1
        else:
            loop.count(opcode, suffixes, operands)
    return Kernel(whole, loops)


def kernels(
    ops: list[str], sms: list[int], pattern: str
) -> Iterator[tuple[str, Chip, Launch, Kernel]]:
    """Every launch on the chips whose label `pattern` is found in, compiled and taken apart."""
    for op in ops:
        for chip in CHIPS:
            for launch in triton_cases.launches_on(op, chip.block_kib) if chip.sm in sms else ():
                if re.search(pattern, launch.label):
                    sass = cuobjdump(compile_for(chip, launch), "-sass")
                    yield op, chip, launch, kernel_of(sass, launch.num_warps)


def as_text(loop: Loop, sm: int) -> str:
    def listed(counts: Counter, unit: str = "") -> str:
        return ", ".join(f"{count} {name}{unit}" for name, count in counts.most_common())

    text = f"  {loop.begin:#x}-{loop.end:#x}: {loop.instructions} instructions: "
    text += listed(loop.kinds) + (f"; {loop.skipped} more behind branches" if loop.skipped else "")
    for name, counts, unit in (
        ("products", loop.products, ""),
        ("loads", loop.loads, " bits"),
        ("stores", loop.stores, " bits"),
    ):
        text += f"\n    {name}: {listed(counts, unit)}" if counts else ""
    cycles = loop.cycles(sm)
    text += "\n    cycles: " + ", ".join(f"{unit} {value:.0f}" for unit, value in cycles.items())
    if cycles["tensor"]:
        text += "; tensor cores predicted at {:.0%}, in turn {:.0%}".format(*loop.fractions(sm))
    return text


def main() -> None:
    sms = [chip.sm for chip in CHIPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=triton_cases.modules(), help="one op's kernels only")
    parser.add_argument("--sm", type=int, nargs="+", choices=sms, default=sms)
    parser.add_argument("--launch", default="", help="regular expression that is in the label")
    parser.add_argument("--json", type=Path, help="write this file instead of printing")
    args = parser.parse_args()
    ops = [args.op] if args.op else list(triton_cases.modules())
    rows = []
    for op, chip, launch, kernel in kernels(ops, args.sm, args.launch):
        rows.append(
            {
                "op": op,
                "launch": launch.label,
                "sm": chip.sm,
                "whole": vars(kernel.whole),
                "loops": [vars(loop) for loop in kernel.loops],
            }
        )
        if args.json is None:
            print(
                f"\n{op}: {launch.label}, sm_{chip.sm}, {launch.num_warps} warps, "
                f"Triton {triton.__version__}"
            )
            print("\n".join(as_text(loop, chip.sm) for loop in kernel.loops))
    if args.json is not None:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
