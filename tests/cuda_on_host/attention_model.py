"""What share of a GPU's limit attention in CUDA C++, and in Triton, should reach, by counts alone.

    python -m tests.cuda_on_host.attention_model    writes bench/results/cuda_attention.json and .md

A kernel's time is that of the multiprocessor that ends last: blocks start in their order where
least is left to do, and each takes the turns of its loop times the cycles that the compiled code
needs (sass.py), the mean of all units overlapped and of products and the rest in turn. Rows and
keys that fill no tile count as if they did. What reads and adds up sums takes its bytes' time. A
launch's start is left out. The limit is the useful products at the data sheet's rate: those of the
keys that a row sees, five for the backward. Predicted, never measured.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil

from bench import triton_loops
from bench.cuda_binaries import instances
from bench.cuda_loops import hottest
from bench.model_gpu import L2_SPEED, SHARE, Gpu
from bench.sass import Loop, kernel_of
from glmkern.triton_kernels.prefix_attention import backward, dkv, forward
from glmkern.triton_kernels.prefix_attention.shared import AttentionTile
from tests.cuda_on_host.host import ROOT
from tests.cuda_on_host.model import GPUS, write_table

TABLE = ROOT / "bench/results/cuda_attention.json"
HEADS, GROUPS, CHANNELS, PREFIX = 16, 2, 128, 128  # ChatGLM2-6B's; heads of one group
TOKENS = (512, 1024)  # of one sequence
# Branches skip such instructions at the end only; masks they skip at all but a row's last keys.
LOADING = ("tensor", "copy", "global", "shared")


@dataclass(frozen=True)
class Walk:
    """A kernel whose blocks own `own` rows or keys, and walk the others `turn` at a time."""

    own: int
    turn: int
    loop: Loop

    def cycles(self, turns: Sequence[int], gpu: Gpu) -> float:
        """Of the multiprocessor that ends last; blocks start in the order of `turns`."""
        busy = [0.0] * gpu.multiprocessors
        for count in turns:
            heapq.heapreplace(busy, busy[0] + count * self.loop.mean_cycles(gpu.sheet.capability))
        return max(busy)


@dataclass(frozen=True)
class Kernels:
    """Of one backend on one chip; `together`: one launch has the keys of tokens and prefix."""

    attend: Walk
    queries: Walk
    keys: Walk
    prefix: Walk
    together: bool


def row_turns(walk: Walk, tokens: int) -> list[int]:
    """Of blocks that own rows, the last ones first, as they start."""
    tiles = ceil(tokens * HEADS / walk.own)
    seen = [min((walk.own * (tile + 1) - 1) // HEADS + 1, tokens) for tile in range(tiles)]
    turns = [ceil(PREFIX / walk.turn) + ceil(keys / walk.turn) for keys in reversed(seen)]
    return [count for count in turns for _ in range(GROUPS)]


def splits(tokens: int) -> tuple[int, int]:
    """Of the tokens' keys and of the prefix's, as csrc/cuda/prefix_attention.cpp has them."""
    seen = tokens / 2
    most = ceil(tokens * HEADS / 256)
    share = seen / (seen + PREFIX)
    blocks = [(216 * share, tokens), (216 * (1 - share), PREFIX)]
    own, prefix = (round(wanted / (GROUPS * ceil(keys / 64))) for wanted, keys in blocks)
    return max(min(own, most), 1), max(min(prefix, most), 1)


def splits_of_triton(tokens: int) -> tuple[int, int]:
    own, prefix = (
        dkv.row_splits(GROUPS * ceil(keys / dkv.KEYS_OF_A_PROGRAM), tokens * HEADS)
        for keys in (tokens, PREFIX)
    )
    return own, prefix


def key_turns(walk: Walk, tokens: int, splits: int) -> list[int]:
    rows = [tokens * HEADS - key * HEADS for key in range(0, tokens, walk.own)]
    return [ceil(r / walk.turn / splits) for r in rows for _ in range(GROUPS * splits)]


def prefix_turns(walk: Walk, tokens: int, splits: int) -> list[int]:
    turns = ceil(ceil(tokens * HEADS / splits) / walk.turn)
    return [turns] * (ceil(PREFIX / walk.own) * GROUPS * splits)


def seconds(kernels: Kernels, tokens: int, gpu: Gpu) -> tuple[float, float]:
    """Of the forward and of the backward."""
    attend = kernels.attend.cycles(row_turns(kernels.attend, tokens), gpu)
    queries = kernels.queries.cycles(row_turns(kernels.queries, tokens), gpu)
    of_own, of_prefix = (splits if kernels.together else splits_of_triton)(tokens)
    own = key_turns(kernels.keys, tokens, of_own)
    prefix = prefix_turns(kernels.prefix, tokens, of_prefix)
    if kernels.together:
        keys = kernels.keys.cycles(own + prefix, gpu)
    else:
        keys = kernels.keys.cycles(own, gpu) + kernels.prefix.cycles(prefix, gpu)
    clock, memory = gpu.boost_ghz * 1e9, gpu.sheet.bandwidth * 1e9 * SHARE
    read = 2 * 2 * tokens * GROUPS * HEADS * CHANNELS  # dout and out, for rowsum(dout * out)
    written = of_prefix * PREFIX + (of_own * tokens if of_own > 1 else 0)
    sums = 2 * 2 * 4 * written * GROUPS * CHANNELS  # of dk and dv, written and read
    return attend / clock, (queries + keys) / clock + read / memory + sums / (memory * L2_SPEED)


def flops(tokens: int) -> float:
    """Of the forward's two products."""
    return 4.0 * GROUPS * HEADS * CHANNELS * (tokens * (tokens + 1) / 2 + tokens * PREFIX)


@cache
def of_cuda(sm: int) -> Kernels:
    loops = {}
    for instance in instances([sm], "prefix_attention/attention_sm"):
        given = instance.given
        few = given.get("kWarps") == "1"
        if (given["T"], given["kChannels"], given["kWide"], few) == ("half", "128", "true", False):
            kernel = kernel_of(instance.sass, instance.warps, always=LOADING)
            loops[instance.kernel] = hottest(kernel)
    keys = Walk(64, 16, loops["key_gradients_mma_kernel"])
    return Kernels(
        attend=Walk(64, 32, loops["attend_mma_kernel"]),
        queries=Walk(64, 16 if sm < 80 else 32, loops["query_gradient_mma_kernel"]),
        keys=keys,
        prefix=keys,
        together=True,
    )


@cache
def of_triton(sm: int) -> Kernels | None:
    if sm < 80:
        return None
    loops, tiles = {}, {}
    for _, chip, launch, kernel in triton_loops.kernels(["prefix_attention"], [sm], "bfloat16"):
        loops.setdefault(launch.kernel.__name__, hottest(kernel))
        for name, module in (("fwd", forward), ("dq", backward), ("dkv", dkv)):
            tiles[name] = module.TILES[max(kib for kib in module.TILES if kib <= chip.block_kib)][2]

    def walk(name: str, tile: AttentionTile, by_keys: bool) -> Walk:
        own, turn = (tile.keys, tile.rows) if by_keys else (tile.rows, tile.keys)
        return Walk(own, turn, loops[f"prefix_attention_{name}_kernel"])

    return Kernels(
        attend=walk("fwd", tiles["fwd"], by_keys=False),
        queries=walk("bwd_dq", tiles["dq"], by_keys=False),
        keys=walk("bwd_dkv", tiles["dkv"], by_keys=True),
        prefix=walk("bwd_dprefix", tiles["dkv"], by_keys=True),
        together=False,
    )


def predictions() -> Iterator[dict[str, object]]:
    for name, gpu in GPUS.items():
        for tokens in TOKENS:
            row: dict[str, object] = {"gpu": name, "tokens": tokens}
            for backend, make in (("cuda", of_cuda), ("triton", of_triton)):
                kernels = make(gpu.sheet.capability)
                if kernels is None:
                    continue
                forward_time, backward_time = seconds(kernels, tokens, gpu)
                limit = flops(tokens) / (gpu.sheet.half * 1e12)
                row[backend] = {
                    "forward_us": round(forward_time * 1e6, 1),
                    "forward": round(limit / forward_time, 3),
                    "backward_us": round(backward_time * 1e6, 1),
                    "backward": round(2.5 * limit / backward_time, 3),
                }
            yield row


def as_markdown(rows: list[dict]) -> str:
    lines = [
        "# Attention in CUDA C++ and in Triton, predicted",
        "",
        "Made by `python -m tests.cuda_on_host.attention_model` without a GPU, which says how;",
        "**nothing here was measured**. The share of the tensor cores' rate, by the useful",
        "products of half precision, that one sequence of ChatGLM2-6B beside a prefix of 128",
        "should reach; in brackets the microseconds. A launch's start is left out.",
        "",
        "| GPU | tokens | forward, CUDA C++ | Triton | backward, CUDA C++ | Triton |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[backend][part]:.2f} ({row[backend][part + '_us']:.0f})"
            if backend in row
            else "-"
            for part in ("forward", "backward")
            for backend in ("cuda", "triton")
        ]
        lines.append(f"| {row['gpu']} | {row['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = list(predictions())
    write_table(TABLE, found, as_markdown(found))
