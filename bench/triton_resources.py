"""What the Triton kernels take of each chip: registers, spills, shared memory, occupancy.

    python -m bench.triton_resources            prints the table and writes it to bench/results/,
                                                where each version of Triton has its own
    python -m bench.triton_resources --json F   writes only F
    python -m bench.triton_resources --op OP    prints one op's table only, for work on its tiles

Needs no GPU: Triton brings the compilers. Every launch of bench/triton_cases is recorded as the op
makes it on each chip and compiled for that chip; `cuobjdump` reads the numbers from the binary.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bench import triton_cases
from bench.triton_cases import Launch

RESULTS = Path(__file__).with_name("results")
CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Chip:
    """Limits from the CUDA C++ programming guide, table "technical specifications"."""

    sm: int
    warps: int  # resident on a multiprocessor
    shared_kib: int  # of a multiprocessor
    registers: int = 65536
    reserved_kib: int = 1  # of shared memory, a block, beside what it asks for

    @property
    def block_kib(self) -> int:
        return self.shared_kib - self.reserved_kib


CHIPS = (
    Chip(80, 64, 164),
    Chip(86, 48, 100),
    Chip(89, 48, 100),
    Chip(90, 64, 228),
    Chip(100, 64, 228),
    Chip(120, 48, 100),
)


@dataclass(frozen=True)
class Usage:
    """What one launch takes on one chip."""

    sm: int
    tile: dict  # the launch's constants that are sizes of blocks, warps and stages
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a block
    occupancy: float  # resident warps, of the most the chip holds


def source_of(launch: Launch) -> ASTSource:
    """The launch specialised as Triton's launcher does.

    None, 1 and constexpr arguments go by value, and tensors as aligned to 16 bytes (torch's
    allocator gives more). Other numbers are run-time ones; unless under do_not_specialize, the
    launcher notes whether 16 divides them.
    """
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.kernel.params):
        name, special = param.name, not param.do_not_specialize
        value = launch.constants[name] if name in launch.constants else launch.args[i]
        if name in launch.constants or value is None or (special and _is_one(value)):
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if not param.do_not_specialize_on_alignment:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _is_one(value: object) -> bool:
    return isinstance(value, int) and value == 1


def compile_for(chip: Chip, launch: Launch) -> CompiledKernel:
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source_of(launch), target=GPUTarget("cuda", chip.sm, 32), options=options)


def cuobjdump(compiled: CompiledKernel, option: str) -> str:
    """What the tool prints of the kernel's binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run(
            [CUOBJDUMP, option, cubin.name], check=True, capture_output=True, text=True
        ).stdout


def usage_of(launch: Launch, chip: Chip) -> Usage:
    compiled = compile_for(chip, launch)
    printed = cuobjdump(compiled, "-res-usage")
    registers, stack, local = (
        int(re.search(rf"{field}:(\d+)", printed)[1]) for field in ("REG", "STACK", "LOCAL")
    )
    shared = compiled.metadata.shared
    tile = {
        name: value
        for name, value in launch.constants.items()
        if name.startswith("B") and not isinstance(value, bool)
    }
    tile |= {"warps": launch.num_warps, "stages": launch.num_stages}
    return Usage(
        chip.sm,
        tile,
        registers,
        stack + local,
        shared,
        occupancy(chip, registers, shared, launch.num_warps),
    )


def occupancy(chip: Chip, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps over the chip's limit. Each quarter of a multiprocessor holds whole warps, and
    each thread gets registers in multiples of 8."""
    warp_registers = -(-registers // 8) * 8 * 32
    by_registers = chip.registers // 4 // warp_registers * 4 // num_warps
    by_shared = chip.shared_kib * 1024 // max(shared + chip.reserved_kib * 1024, 1)
    blocks = min(by_registers, by_shared, chip.warps // num_warps)
    return round(blocks * num_warps / chip.warps, 3)


def measure_launch(op: str, chip: Chip, index: int) -> tuple[str, str, dict]:
    launch = triton_cases.launches_on(op, chip.block_kib)[index]
    return launch.label, launch.kernel.__name__, asdict(usage_of(launch, chip))


def measure(ops: list[str]) -> dict:
    """Compiles everything; the dictionary is what the JSON file holds."""
    tasks = [
        (op, chip, i)
        for op in ops
        for chip in CHIPS
        for i in range(len(triton_cases.launches_on(op, chip.block_kib)))
    ]
    rows = {}
    with concurrent.futures.ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for (op, _, _), (label, kernel, usage) in zip(
            tasks, pool.map(measure_launch, *zip(*tasks, strict=True)), strict=True
        ):
            row = {"op": op, "launch": label, "kernel": kernel, "usage": []}
            rows.setdefault((op, label), row)["usage"].append(usage)
    return {"triton": triton.__version__, "rows": list(rows.values())}


def results_path(table: dict, suffix: str) -> Path:
    """triton_resources_3.9.json, say."""
    version = ".".join(table["triton"].split(".")[:2])
    return RESULTS / f"triton_resources_{version}.{suffix}"


def as_json(table: dict) -> str:
    """One line a launch, so that a change shows as one line."""
    rows = ",\n".join(json.dumps(row) for row in table["rows"])
    return f'{{"triton": "{table["triton"]}", "rows": [\n{rows}\n]}}\n'


HEAD = """# What the Triton kernels take of each chip

Made by `python -m bench.triton_resources` with Triton {triton}; under that Triton, a test compiles
everything again and compares. Each launch is named by its kernel, its size and its type; a cell
says registers of a thread / bytes of shared memory of a block / occupancy. {spills}
"""


def as_markdown(table: dict) -> str:
    spilling = sum(usage["stack"] > 0 for row in table["rows"] for usage in row["usage"])
    text = HEAD.format(
        triton=table["triton"],
        spills=f"{spilling} of them spill." if spilling else "None spills a register.",
    )
    for op in dict.fromkeys(row["op"] for row in table["rows"]):
        text += f"\n## {op}\n\n{triton_cases.modules()[op].REASON}\n\n"
        text += f"| launch | {' | '.join(f'sm_{chip.sm}' for chip in CHIPS)} | tiles |\n"
        text += "|---" * (2 + len(CHIPS)) + "|\n"
        text += "".join(_markdown_row(row) for row in table["rows"] if row["op"] == op)
    return text


def _markdown_row(row: dict) -> str:
    usage = {u["sm"]: u for u in row["usage"]}
    cells = [_cell(usage.get(chip.sm)) for chip in CHIPS]
    tiles = {}
    for u in row["usage"]:
        tile = " ".join(f"{name}={value}" for name, value in u["tile"].items())
        tiles.setdefault(tile, []).append(str(u["sm"]))
    named = "; ".join(
        tile if len(tiles) == 1 else f"sm_{', '.join(sms)}: {tile}" for tile, sms in tiles.items()
    )
    return f"| {row['launch']} | {' | '.join(cells)} | {named} |\n"


def _cell(usage: dict | None) -> str:
    if usage is None:
        return "-"
    text = f"{usage['registers']} / {usage['shared']} / {usage['occupancy']:.0%}"
    return text + (f" / **{usage['stack']} spilled**" if usage["stack"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write only this file")
    parser.add_argument("--op", help="compile one op's kernels only, and only print")
    args = parser.parse_args()
    table = measure([args.op] if args.op else list(triton_cases.modules()))
    if args.json is not None:
        args.json.write_text(as_json(table))
        return
    if args.op is None:
        results_path(table, "json").write_text(as_json(table))
        results_path(table, "md").write_text(as_markdown(table))
    print(as_markdown(table))


if __name__ == "__main__":
    main()
