"""What the CUDA C++ kernels take of each chip: registers, spills, shared memory, occupancy.

    python -m bench.cuda_resources                 writes the table to bench/results/ and prints it
    python -m bench.cuda_resources --file rms_norm prints the kernels of these files only

Needs no GPU, but nvcc. Every instance of every kernel's template is compiled for each chip
(bench/cuda_binaries.py). The JSON file also counts instructions: accesses to memory by their width,
and products of tensor cores. Nothing here was measured.
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.cuda_binaries import CHIPS, Instance, instances, nvcc_version
from bench.sass import Instruction
from bench.sass import instructions as instructions_of
from bench.triton_resources import occupancy

RESULTS = Path(__file__).with_name("results")
SMS = tuple(chip.sm for chip in CHIPS)
# LD and ST do not say which memory they access.
ACCESSES = {"LDG", "STG", "LD", "ST", "LDGSTS", "LDS", "STS", "LDL", "STL", "ATOMG", "RED", "ATOMS"}
MATRICES = {"LDSM", "STSM"}


def usage_of(instance: Instance) -> dict:
    """What one instance takes on one chip; registers and stack of a thread, stack and shared in
    bytes, occupancy of the warps that the chip holds."""
    chip = instance.chip
    instructions = [i for i in instructions_of(instance.sass) if i.opcode != "NOP"]
    return {
        "sm": chip.sm,
        "registers": instance.registers,
        "stack": instance.stack,
        "shared": instance.shared,
        "occupancy": occupancy(chip, instance.registers, instance.shared, instance.warps),
        "instructions": len(instructions),
        "counts": dict(sorted(Counter(filter(None, map(counted_as, instructions))).items())),
    }


def counted_as(instruction: Instruction) -> str | None:
    """LDG.128, for a load of 128 bits a lane; LDSM.x4, of four matrices a warp; HMMA.16816."""
    if instruction.opcode in ACCESSES and not instruction.discards:
        return f"{instruction.opcode}.{instruction.bits}"
    if instruction.opcode in MATRICES:
        return f"{instruction.opcode}.x{instruction.matrices}"
    if instruction.kind == "tensor":
        return ".".join([instruction.opcode, *instruction.suffixes[:1]])
    return None


def measure(sms: Sequence[int] = SMS, pattern: str = "") -> dict:
    """Compiles what has changed; the dictionary is what the JSON file holds."""
    rows: dict[tuple[str, str], dict] = {}
    for instance in instances(sms, pattern):
        row: dict = {
            "file": instance.file,
            "kernel": instance.kernel,
            "parameters": list(instance.parameters),
            "arguments": list(instance.arguments),
            "threads": instance.threads,
            "usage": [],
        }
        row = rows.setdefault((instance.file, instance.name), row)
        row["usage"].append(usage_of(instance))
    return {"nvcc": nvcc_version(), "rows": list(rows.values())}


def as_json(table: dict) -> str:
    """One line an instance, so that a change shows as one line."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in table["rows"])
    return f'{{"nvcc": "{table["nvcc"]}", "rows": [\n{rows}\n]}}\n'


HEAD = """# What the CUDA C++ kernels take of each chip

Made by `python -m bench.cuda_resources` with nvcc {nvcc}, **without a GPU**; under that nvcc, a
test compiles again and compares. A line is an instance of a kernel's template. A chip's cell is the
registers of a thread. {spills}

* shared: static bytes of a block
* occupancy: the lowest that registers and `shared` allow, with blocks of the largest size; memory
  that a launch asks for besides is in cuda_memory.md, up to 48 KiB for tensor cores
* 16 bytes: loads and stores of that width in the code for sm_90, or for the newest chip that has
  the kernel
"""


def as_markdown(table: dict) -> str:
    spilling = sum(usage["stack"] > 0 for row in table["rows"] for usage in row["usage"])
    text = HEAD.format(
        nvcc=table["nvcc"],
        spills=f"{spilling} of them spill." if spilling else "None spills a register.",
    )
    chips = " | ".join(f"sm_{sm}" for sm in SMS)
    by_file = itertools.groupby(table["rows"], lambda row: row["file"])
    for file, rows_of_file in by_file:
        text += f"\n## {file}\n"
        for kernel, rows in itertools.groupby(rows_of_file, lambda row: row["kernel"]):
            first, *others = rows
            template = f"{kernel}<{', '.join(first['parameters'])}>".replace("<>", "")
            text += f"\n`{template}`, {first['threads']} threads:\n\n"
            text += f"| instance | {chips} | shared | occupancy | 16 bytes |\n"
            text += "|---" * (4 + len(SMS)) + "|\n"
            text += "".join(map(_markdown_row, (first, *others)))
    return text


def _markdown_row(row: dict) -> str:
    usage = {u["sm"]: u for u in row["usage"]}
    worst = min(usage.values(), key=lambda u: u["occupancy"])["occupancy"]
    where = [str(sm) for sm, u in usage.items() if u["occupancy"] == worst]
    occupied = f"{worst:.0%}"
    if len(where) < len(usage):
        occupied += f" on sm_{', '.join(where)}"
    cells = [_cell(usage.get(sm)) for sm in SMS]
    shared = " or ".join(map(str, sorted({u["shared"] for u in usage.values()})))
    counts = usage.get(90, row["usage"][-1])["counts"]
    wide = f"{counts.get('LDG.128', 0)} / {counts.get('STG.128', 0)}"
    name = ", ".join(row["arguments"]) or row["kernel"]
    return f"| {name} | {' | '.join(cells)} | {shared} | {occupied} | {wide} |\n"


def _cell(usage: dict | None) -> str:
    if usage is None:
        return "-"
    spilled = f", **{usage['stack']} bytes spilled**" if usage["stack"] else ""
    return f"{usage['registers']}{spilled}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="only print the kernels of files with this in their name")
    args = parser.parse_args()
    table = measure(pattern=args.file or "")
    if args.file is None:
        path = RESULTS / "cuda_resources.json"
        path.write_text(as_json(table))
        path.with_suffix(".md").write_text(as_markdown(table))
    print(as_markdown(table))


if __name__ == "__main__":
    main()
