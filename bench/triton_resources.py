"""What the Triton kernels take of each chip: registers, spills, shared memory, occupancy.

    python -m bench.triton_resources            prints the table and writes bench/results/
    python -m bench.triton_resources --json F   writes only F

Needs no GPU: Triton brings the compilers. Every launch of the cases below is recorded as the op
makes it and compiled for each chip; `cuobjdump` reads the numbers from the binary.
"""

import argparse
import concurrent.futures
import contextlib
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).with_name("results") / "triton_resources"
CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Chip:
    """Limits from the CUDA C++ programming guide, table "technical specifications"."""

    sm: int
    warps: int                # resident on a multiprocessor
    shared_kib: int           # of a multiprocessor; a block may have 1 KiB less
    registers: int = 65536

    @property
    def shared_limit(self) -> int:
        return (self.shared_kib - 1) * 1024


CHIPS = (Chip(80, 64, 164), Chip(86, 48, 100), Chip(89, 48, 100), Chip(90, 64, 228),
         Chip(100, 64, 228), Chip(120, 48, 100))


class Launch(NamedTuple):
    """One launch as an op makes it: its label, the Triton function and its arguments."""

    label: str
    kernel: triton.JITFunction
    args: tuple
    num_warps: int
    constants: dict


@dataclass(frozen=True)
class Usage:
    """What one launch takes on one chip."""

    sm: int
    registers: int            # a thread
    stack: int                # bytes a thread: spilled registers
    shared: int               # bytes a block
    occupancy: float          # resident warps, of the most the chip holds


def rms_norm_launches() -> Iterator[Launch]:
    """Every line of the table of row tiles in fp32, the widest type, and the model's in bf16."""
    widths = [(width, torch.float32) for width in (256, 1024, 4096, 8192, 16384)]
    for width, dtype in [*widths, (4096, torch.bfloat16)]:
        x = torch.empty(1500, width, dtype=dtype, device="meta")
        weight, rstd = x[0], torch.empty(1500, device="meta")
        with recorded("rms_norm", f"{width} {str(dtype).removeprefix('torch.')}") as record:
            yield record("rms_norm_fwd", x, weight, 1e-5)
            yield record("add_rms_norm_fwd", x, x, weight, 1e-5)
            yield record("rms_norm_bwd", x, x, weight, rstd, x, False)
            yield record("rms_norm_bwd", x, x, weight, rstd, x, True, note=" + dweight")


@contextlib.contextmanager
def recorded(op: str, case: str):
    """Yields `record(function, *args)`, which calls a launcher of glmkern.triton_kernels.<op> on
    tensors without data and returns the launch it made."""
    module = importlib.import_module(f"glmkern.triton_kernels.{op}")
    launches = []

    def keep(kernel, programs, *args, num_warps, **constants):
        launches.append((kernel, args, num_warps, constants))

    def record(function, *args, note=""):
        getattr(module, function)(*args)
        return Launch(f"{function}{note}, {case}", *launches.pop())

    with mock.patch.object(module, "launch", keep):
        yield record


def launches() -> list[Launch]:
    return [*rms_norm_launches()]


def source_of(launch: Launch) -> ASTSource:
    """The launch specialised as Triton's launcher does: None and constexpr arguments by value,
    tensors as aligned to 16 bytes (torch's allocator gives more), numbers as run-time ones."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.args[i]
        if name in launch.constants or value is None:
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(launch.kernel, signature, constants, attributes)


def usage_of(launch: Launch, chip: Chip) -> Usage:
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", chip.sm, 32),
                              options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        printed = subprocess.run([CUOBJDUMP, "-res-usage", cubin.name], check=True,
                                 capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", printed)[1])
                               for field in ("REG", "STACK", "LOCAL"))
    shared = compiled.metadata.shared
    return Usage(chip.sm, registers, stack + local, shared,
                 occupancy(chip, registers, shared, launch.num_warps))


def occupancy(chip: Chip, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps over the chip's limit. Each quarter of a multiprocessor holds whole warps,
    registers are given out 8 a thread at a time, and a block takes 1 KiB of shared memory more
    than it asks for."""
    warp_registers = -(-registers // 8) * 8 * 32
    by_registers = chip.registers // 4 // warp_registers * 4 // num_warps
    by_shared = chip.shared_kib * 1024 // (shared + 1024)
    blocks = min(by_registers, by_shared, chip.warps // num_warps)
    return round(blocks * num_warps / chip.warps, 3)


def measure_launch(index: int) -> dict:
    launch = launches()[index]
    return {"launch": launch.label, "kernel": launch.kernel.__name__,
            "constants": launch.constants, "num_warps": launch.num_warps,
            "usage": [asdict(usage_of(launch, chip)) for chip in CHIPS]}


def measure() -> dict:
    """Compiles everything; the dictionary is what the JSON file holds."""
    with concurrent.futures.ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = list(pool.map(measure_launch, range(len(launches()))))
    return {"triton": triton.__version__, "rows": rows}


def as_json(table: dict) -> str:
    """One line a launch, so that a change shows as one line."""
    rows = ",\n".join(json.dumps(row) for row in table["rows"])
    return f'{{"triton": "{table["triton"]}", "rows": [\n{rows}\n]}}\n'


HEAD = """# Registers / shared memory in bytes / occupancy of the Triton kernels

Made by `python -m bench.triton_resources` with Triton {triton}; a test compiles everything again
and compares. Each launch is named by its function, row length and type. {spills}

| launch | warps | {chips} |
{rule}
"""


def as_markdown(table: dict) -> str:
    spilling = sum(usage["stack"] > 0 for row in table["rows"] for usage in row["usage"])
    head = HEAD.format(
        triton=table["triton"], chips=" | ".join(f"sm_{chip.sm}" for chip in CHIPS),
        spills=f"{spilling} of them spill." if spilling else "None spills a register.",
        rule="|---" * (2 + len(CHIPS)) + "|")
    return head + "".join(f"{_markdown_row(row)}\n" for row in table["rows"])


def _markdown_row(row: dict) -> str:
    cells = [f"{u['registers']} / {u['shared']} / {u['occupancy']:.0%}"
             + (f" / **{u['stack']} spilled**" if u["stack"] else "") for u in row["usage"]]
    return f"| {row['launch']} | {row['num_warps']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write only this file")
    path = parser.parse_args().json
    table = measure()
    text = as_json(table)
    if path is not None:
        path.write_text(text)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.with_suffix(".json").write_text(text)
    RESULTS.with_suffix(".md").write_text(as_markdown(table))
    print(as_markdown(table))


if __name__ == "__main__":
    main()
