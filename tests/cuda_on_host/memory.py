"""What the CUDA kernels ask of memory at the shapes of ChatGLM2-6B, counted without a GPU.

    python -m tests.cuda_on_host.memory         writes bench/results/cuda_memory.json and .md

The machine that runs the kernels as C++ counts as machine/counters.h says. Rows and, of weights,
some thousand numbers stand for a whole tensor: a block's accesses are the same.
"""

import json

import torch

from tests.cuda_on_host import cases
from tests.cuda_on_host.host import ROOT
from tests.cuda_on_host.machine import Kernel, Machine
from tests.cuda_on_host.sanitized import library, load_kernels

TABLE = ROOT / "bench/results/cuda_memory.json"
HEADINGS = ("case", "kernel", "blocks", "barriers", "shared", "wavefronts", "conflicts", "useful")
HEAD = """# What the CUDA C++ kernels ask of memory

Made by `python -m tests.cuda_on_host.memory`, which runs the kernels on a CPU and counts what a GPU
would do; **nothing here was measured on a GPU**. Barriers and bytes of shared memory are those of a
block. A wavefront is an access to shared memory of up to 32 banks at once; conflicts are those more
that words of one bank take. Useful are the bytes that the lanes of an access ask for, of those that
its sectors of 32 bytes hold: less than all where lanes read one number (a seed, a position), and
where a thread takes 16 bytes of every 32, whose other half its next access finds in L1.
"""


def cases_of_6b() -> list[cases.Case]:
    half = torch.float16
    found = [
        cases.rms_norm(16, 4096, half),
        cases.bias_dropout([0, cases.ROWS], 4096, half),
        cases.rope((2, 32, 2, 128, 32, False), half),
        cases.swiglu(2, 13696, half),
        cases.linear_cross_entropy(256, 8192, half, None, 0.0),
        cases.quant_linear(1, 64, 4096, 4, torch.float32, "gemv"),
    ]
    for version in (75, 80):
        found.append(cases.prefix_attention((32, 2, 128, 128), half, version))
        for bits in (4, 8):
            for tokens in (1, 16, 32, 64):
                found.append(
                    cases.quant_linear(
                        tokens, 256, 2048, bits, half, "mma", version, splits=2 * (tokens == 64)
                    )
                )
    return found


def row_of(case: str, name: str, kernel: Kernel) -> dict[str, object]:
    return {
        "case": case,
        "kernel": name,
        "blocks": kernel.blocks,
        "barriers": kernel.barriers / kernel.blocks,
        "shared": kernel.shared_bytes,
        "wavefronts": kernel.total("wavefronts", "shared"),
        "conflicts": kernel.conflicts,
        "useful": round(kernel.useful, 3),
    }


def count() -> list[dict[str, object]]:
    """A row for each case and kernel, of equal numbers each time."""
    kernels, machine = load_kernels(), Machine(library())
    rows = []
    for case in cases_of_6b():
        with machine.counting() as counted:
            case.run(kernels, machine)
        rows += [row_of(str(case), name, kernel) for name, kernel in sorted(counted.items())]
    return rows


def as_markdown(rows: list[dict[str, object]]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    lines += [[f"{row[heading]}" for heading in HEADINGS] for row in rows]
    return HEAD + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    rows = count()
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    TABLE.with_suffix(".md").write_text(as_markdown(rows))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
