"""What share of a GPU's limit the 4-bit products of CUDA C++ should reach, from counts alone.

    python -m tests.cuda_on_host.model      writes bench/results/cuda_products.json and .md

Of each product of ChatGLM2-6B: the longest of

    tensor     the work of the multiprocessor with most blocks: the cycles that its loop's compiled
               code needs (sass.py), the mean of all units overlapped and of products and the rest
               in turn. Tokens and results that fill no tile count as if they did
    bytes      the weight once, the activations, and what splits write and read, from memory
    L2         the weight once for each block of tokens, from the L2 cache

plus the reading of a split's sums from the L2 cache. A launch's start is left out. The limit is the
longer of reading all once and computing at the data sheet's rate. Predicted, never measured.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from bench.cuda_binaries import instances
from bench.cuda_loops import hottest
from bench.model_gpu import L2_SPEED, NAMED, SHARE, Gpu
from bench.sass import Loop, kernel_of
from tests.cuda_on_host.host import ROOT
from tests.cuda_on_host.library import build
from tests.cuda_on_host.machine import Machine, Plan

TABLE = ROOT / "bench/results/cuda_products.json"
GPUS = {name: NAMED[name] for name in ("T4", "RTX 3060 12GB", "RTX 4090", "A100 80GB")}
TOKENS = (1, 16, 64, 192, 512)
# Rows and columns of the four weights of a layer.
WEIGHTS = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))
HALF = 2  # bytes


@dataclass(frozen=True)
class Product:
    tokens: int
    rows: int
    columns: int
    backward: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * self.rows * self.columns

    @property
    def weight_bytes(self) -> float:
        return self.rows * self.columns / 2 + 4 * self.rows

    @property
    def bytes(self) -> float:
        return self.weight_bytes + HALF * self.tokens * (self.rows + self.columns)

    @property
    def results(self) -> int:
        return self.tokens * (self.columns if self.backward else self.rows)

    def limit(self, gpu: Gpu) -> float:
        """Seconds."""
        return max(self.bytes / (gpu.sheet.bandwidth * 1e9), self.flops / (gpu.sheet.half * 1e12))


def seconds(product: Product, plan: Plan, loop: Loop, gpu: Gpu) -> tuple[float, str]:
    """And what most of them are due to."""
    memory = gpu.sheet.bandwidth * 1e9 * SHARE
    sums = 4 * product.results * plan.splits if plan.splits > 1 else 0
    each = _fmas_of_block(product, plan) / (loop.warps * loop.fmas)  # turns of the loop
    most = -(-plan.blocks // gpu.multiprocessors)
    limits = {
        "tensor": most * each * loop.mean_cycles(gpu.sheet.capability) / (gpu.boost_ghz * 1e9),
        "bytes": (product.bytes + sums) / memory,
        "L2": plan.token_blocks * product.weight_bytes / (memory * L2_SPEED),
    }
    bound = max(limits, key=lambda name: limits[name])
    return limits[bound] + (sums + HALF * product.results) / (memory * L2_SPEED) * (sums > 0), bound


def _fmas_of_block(product: Product, plan: Plan) -> float:
    """Padding included: every block has as many results as the first."""
    depth = product.rows if product.backward else product.columns
    results = product.columns if product.backward else product.rows
    columns_of_warp = 64 if product.backward else 32
    tiles = -(-results // (plan.warps * columns_of_warp)) / plan.result_blocks
    return plan.tokens * plan.warps * columns_of_warp * tiles * depth / plan.splits


@cache
def _loops(sm: int) -> dict[tuple[str, str], Loop]:
    """By kernel and tokens of a tile: what is compiled for half, 4 bits and 16-byte accesses."""
    found = {}
    for instance in instances([sm], "mma_sm"):
        given = instance.given
        if (given.get("T"), given.get("kBits"), given.get("kWide")) == ("half", "4", "true"):
            kernel = kernel_of(instance.sass, instance.warps, guards=True)
            found[instance.kernel, given["kTokens"]] = hottest(kernel)
    return found


def predictions() -> Iterator[dict[str, object]]:
    machine = Machine(build())
    for name, gpu in GPUS.items():
        loops = _loops(gpu.sheet.capability)
        for backward in (False, True):
            for tokens in TOKENS:
                limit = total = 0.0
                parts = []
                for rows, columns in WEIGHTS:
                    product = Product(tokens, rows, columns, backward)
                    plan = machine.plan(tokens, rows, columns, backward)
                    direction = "backward" if backward else "forward"
                    loop = loops[f"mma_{direction}_kernel", str(plan.tokens)]
                    took, bound = seconds(product, plan, loop, gpu)
                    limit, total = limit + product.limit(gpu), total + took
                    parts.append(
                        asdict(product)
                        | {"splits": plan.splits, "bound": bound}
                        | {"us": round(took * 1e6, 2), "share": round(product.limit(gpu) / took, 3)}
                    )
                yield {
                    "gpu": name,
                    "backward": backward,
                    "tokens": tokens,
                    "share": round(limit / total, 3),
                    "products": parts,
                }


def as_markdown(rows: list[dict[str, object]]) -> str:
    table = {(row["gpu"], row["backward"], row["tokens"]): row for row in rows}
    lines = [
        "# The 4-bit products of CUDA C++, predicted",
        "",
        "Made by `python -m tests.cuda_on_host.model` without a GPU, which says how; **nothing",
        "here was measured**. The share of the GPU's limit, memory's or the tensor cores', that",
        "the four linears of a ChatGLM2-6B layer should reach together, in half; in brackets the",
        "least and the most of the four. A launch's start is left out.",
        "",
        f"| tokens | pass | {' | '.join(GPUS)} |",
        "|---" * (2 + len(GPUS)) + "|",
    ]
    for tokens in TOKENS:
        for backward in (False, True):
            cells = []
            for name in GPUS:
                row = table[name, backward, tokens]
                shares = [part["share"] for part in row["products"]]
                cells.append(f"{row['share']:.2f} ({min(shares):.2f} to {max(shares):.2f})")
            direction = "backward" if backward else "forward"
            lines.append(f"| {tokens} | {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table(table: Path, rows: list[dict[str, object]], markdown: str) -> None:
    """One line a row, so that a change shows as one line; `markdown` beside it, and printed."""
    text = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    table.write_text(f"[\n{text}\n]\n")
    table.with_suffix(".md").write_text(markdown)
    print(markdown)


if __name__ == "__main__":
    found = list(predictions())
    write_table(TABLE, found, as_markdown(found))
