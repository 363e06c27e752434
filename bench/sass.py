"""Machine code of NVIDIA GPUs, as `cuobjdump -sass` prints it: its loops, and what they take.

A loop is what lies between a backward branch and its target, without the loops inside it. For one
iteration of one block, alone on a multiprocessor, `Loop.cycles` says what each unit needs. Two
predictions of the tensor cores' rate follow: as if everything overlapped, and as if products and
the rest took turns. Products that warps make twice count twice. Latencies, bank conflicts and
waiting for memory are not in them.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

# Multiply-adds of fp16 or bf16 with fp32 sums that a multiprocessor's tensor cores start in a
# cycle. NVIDIA's white papers on A100, GA102, Ada, H100, Blackwell and RTX Blackwell: dense TFLOPS
# over 2 x multiprocessors x boost clock. sm_86, 89 and 120 are GeForce chips (RTX 3090, 4090,
# 5090); the same chips on professional cards do twice as many. sm_75 is a T4, by its data sheet.
TENSOR_FMAS = {75: 512, 80: 1024, 86: 256, 89: 256, 90: 2048, 100: 4096, 120: 256}
# Lanes of a multiprocessor: table "throughput of native arithmetic instructions" of the CUDA C++
# programming guide. Additions, multiplications and fma; comparisons, logic and integers; and ex2.
FMA_LANES = {75: 64, 80: 64, 86: 128, 89: 128, 90: 128, 100: 128, 120: 128}
ALU_LANES, MUFU_LANES = 64, 16
# A cycle: white paper on GA102, which compares itself with Turing.
SHARED_BYTES = {75: 64} | dict.fromkeys((80, 86, 89, 90, 100, 120), 128)
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


class Instruction(NamedTuple):
    address: int
    opcode: str
    suffixes: list[str]  # of the opcode: LDG.E.128 has "E" and "128"
    operands: str

    @property
    def kind(self) -> str:
        return next(kind for kind, starts in KINDS if self.opcode.startswith(starts))

    @property
    def bits(self) -> int:
        """That a lane loads or stores, where this is such an instruction."""
        if any(s in {"U8", "S8"} for s in self.suffixes):
            return 8
        if any(s in {"U16", "S16"} for s in self.suffixes):
            return 16
        wide = (s for s in reversed(self.suffixes) if s in {"64", "128", "256"})
        return int(next(wide, 32))

    @property
    def discards(self) -> bool:
        """A load to nowhere, which ptxas sets after copies to shared memory."""
        return self.operands.split("[")[0].strip() == "RZ,"

    @property
    def matrices(self) -> int:
        """That a warp loads or stores, where this is LDSM or STSM."""
        return int(self.suffixes[-1] if self.suffixes[-1] in {"2", "4"} else 1)


def instructions(sass: str) -> list[Instruction]:
    """Of one kernel, in the order of the code."""
    return [
        Instruction(int(address, 16), opcode, suffixes.split(".")[1:], operands)
        for address, opcode, suffixes, operands in LINE.findall(sass)
    ]


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

    @property
    def global_bytes(self) -> int:
        """A warp loads and stores, those that caches serve included."""
        return sum(4 * bits * count for bits, count in (self.loads + self.stores).items())

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
            "shared": self.warps * self.shared_bytes / SHARED_BYTES[sm],
        }

    def in_turn(self, sm: int) -> tuple[float, float]:
        """Cycles of products, which read shared memory as they run, and of the rest."""
        cycles = self.cycles(sm)
        products = max(cycles["tensor"], cycles["shared"])
        return products, max(cycles[unit] for unit in ("issue", "fma", "alu", "mufu"))

    def mean_cycles(self, sm: int) -> float:
        """Of an iteration: the mean of everything overlapped and of the two in turn."""
        products, rest = self.in_turn(sm)
        return (max(products, rest) + products + rest) / 2

    def fractions(self, sm: int) -> tuple[float, float]:
        """Of the tensor cores' rate: with everything overlapped, and in turn."""
        products, rest = self.in_turn(sm)
        tensor = self.cycles(sm)["tensor"]
        return tensor / max(products, rest), tensor / (products + rest)

    def count(self, instruction: Instruction) -> None:
        _, opcode, suffixes, operands = instruction
        kind, bits = instruction.kind, instruction.bits
        self.kinds[kind] += 1
        self.drains += (opcode, suffixes[:1]) == ("WARPGROUP", ["DEPBAR"])
        if kind == "tensor":
            self.products[".".join([opcode, *suffixes])] += 1
            self.fmas += fmas_of(opcode, suffixes)
            self.shared_bytes += operand_bytes(opcode, suffixes, operands)
        elif opcode.startswith("LDG") and kind != "wait":
            self.loads[bits] += 1
            self.shared_bytes += 4 * bits * (kind == "copy")
        elif kind == "global":
            self.stores[bits] += 1
        elif opcode in {"LDSM", "STSM"}:
            self.shared_bytes += 128 * instruction.matrices
        elif kind == "shared" and not instruction.discards:
            self.shared_bytes += 4 * bits


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


def kernel_of(
    sass: str, warps: int, guards: bool = False, always: Collection[str] = ("tensor",)
) -> Kernel:
    """What a branch can skip is not counted, unless it has instructions of the kinds `always`.
    Where branches are `guards`, as `if (i < columns)`, all of it is counted; and what lies out of
    line is not: functions that are called, for divisions' rare cases say."""
    lines = instructions(sass)
    if guards:
        first = min(filter(None, map(out_of_line, lines)), default=lines[-1].address)
        lines = [line for line in lines if line.address < first]
    ends, skips = branches(lines, always)
    if guards:
        skips = []
    whole = Loop(lines[0].address, lines[-1].address, warps)
    loops = [Loop(begin, end, warps) for begin, end in sorted(ends.items())]
    for line in lines:
        whole.count(line)
        around = [loop for loop in loops if loop.begin <= line.address <= loop.end]
        if not around:
            continue
        loop = min(around, key=lambda loop: loop.end - loop.begin)
        if any(loop.begin <= at < line.address < target <= loop.end for at, target in skips):
            loop.skipped += 1
        else:
            loop.count(line)
    return Kernel(whole, loops)


def branches(
    lines: list[Instruction], always: Collection[str]
) -> tuple[dict[int, int], list[tuple[int, int]]]:
    """The last branch back to each address; and branches over code without what `always` runs."""
    running = [line.address for line in lines if line.kind in always]
    ends: dict[int, int] = {}
    skips = []
    for line in lines:
        target = target_of(line) if line.opcode == "BRA" else None
        if target is None:
            continue
        if target < line.address:
            ends[target] = max(line.address, ends.get(target, 0))
        elif not any(line.address < at < target for at in running):
            skips.append((line.address, target))
    return ends, skips


def out_of_line(line: Instruction) -> int | None:
    """Where a called function begins, or what a warp does whose lanes have parted."""
    return target_of(line) if line.opcode == "CALL" or "DIV" in line.suffixes else None


def target_of(line: Instruction) -> int | None:
    found = re.search(r"\b0x([0-9a-f]+)(?!\S)", line.operands)
    return int(found[1], 16) if found else None


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
