"""What share of a GPU's limit attention in CUDA C++, and in Triton, should reach, by counts alone.

    python -m tests.cuda_on_host.attention_model    writes bench/results/cuda_attention.json and .md

A launch's time is that of the multiprocessor that ends last: blocks start in their order where
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
from bench.sass import Kernel, Loop, kernel_of
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

    def cycles(self, turns: Sequence[int], gpu: Gpu) -> list[float]:
        """Of each of its blocks, alone on a multiprocessor."""
        return [count * self.loop.mean_cycles(gpu.sheet.capability) for count in turns]


def launch(blocks: Sequence[float], gpu: Gpu) -> float:
    """Cycles of the multiprocessor that ends last; `blocks` start in their order."""
    busy = [0.0] * gpu.multiprocessors
    for cycles in blocks:
        heapq.heapreplace(busy, busy[0] + cycles)
    return max(busy)


@dataclass(frozen=True)
class Kernels:
    """Of one backend on one chip; `together`: one launch has all gradients."""

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


def plan(tokens: int) -> tuple[int, int]:
    """Blocks of two tiles of the tokens' keys, and splits of the prefix's, as
    csrc/cuda/prefix_attention.cpp has them."""
    share = tokens / (tokens + 2 * PREFIX)  # of the products
    most = ceil(tokens * HEADS / 256)
    pair = round(96 * share / (GROUPS * ceil(tokens / 128)))
    prefix = round(96 * (1 - share) / (GROUPS * ceil(PREFIX / 64)))
    return max(min(pair - 1, most), 1) + 1, max(min(prefix, most), 1)


def splits_of_keys(tokens: int, pair_blocks: int) -> list[int]:
    """Of each tile of 64 keys: csrc/cuda/kernels/prefix_attention/key_task.cuh has the picture."""
    tiles = ceil(tokens / 64)
    found = []
    for tile in range(tiles):
        last = max(tile, tiles - 1 - tile)
        few, all_rows = tokens - 64 * last, 2 * tokens - 64 * (tiles - 1)
        of_last = max((2 * pair_blocks * few + all_rows) // (2 * all_rows), 1)
        if 2 * tile == tiles - 1:
            of_last = pair_blocks // 2
        found.append(of_last if tile == last else pair_blocks - of_last)
    return found


def splits_of_triton(tokens: int) -> tuple[int, int]:
    own, prefix = (
        dkv.row_splits(GROUPS * ceil(keys / dkv.KEYS_OF_A_PROGRAM), tokens * HEADS)
        for keys in (tokens, PREFIX)
    )
    return own, prefix


def key_turns(walk: Walk, tokens: int, splits: Sequence[int]) -> list[int]:
    """`splits` of each tile of keys."""
    rows = [tokens * HEADS - key * HEADS for key in range(0, tokens, walk.own)]
    return [
        ceil(r / walk.turn / share)
        for r, share in zip(rows, splits, strict=True)
        for _ in range(GROUPS * share)
    ]


def prefix_turns(walk: Walk, tokens: int, splits: int) -> list[int]:
    turns = ceil(ceil(tokens * HEADS / splits) / walk.turn)
    return [turns] * (ceil(PREFIX / walk.own) * GROUPS * splits)


def seconds(kernels: Kernels, tokens: int, gpu: Gpu) -> tuple[float, float]:
    """Of the forward and of the backward."""
    attend = launch(kernels.attend.cycles(row_turns(kernels.attend, tokens), gpu), gpu)
    queries = kernels.queries.cycles(row_turns(kernels.queries, tokens), gpu)
    if kernels.together:
        pair_blocks, of_prefix = plan(tokens)
        of_own = splits_of_keys(tokens, pair_blocks)
    else:
        each, of_prefix = splits_of_triton(tokens)
        of_own = [each] * ceil(tokens / kernels.keys.own)
    own = kernels.keys.cycles(key_turns(kernels.keys, tokens, of_own), gpu)
    prefix = kernels.prefix.cycles(prefix_turns(kernels.prefix, tokens, of_prefix), gpu)
    launches = [own + prefix + queries] if kernels.together else [queries, own, prefix]
    gradients = sum(launch(blocks, gpu) for blocks in launches)
    clock, memory = gpu.boost_ghz * 1e9, gpu.sheet.bandwidth * 1e9 * SHARE
    read = 2 * 2 * tokens * GROUPS * HEADS * CHANNELS  # dout and out, for rowsum(dout * out)
    written = of_prefix * PREFIX
    if max(of_own) > 1:
        written += sum(kernels.keys.own * share for share in of_own)
    sums = 2 * 2 * 4 * written * GROUPS * CHANNELS  # of dk and dv, written and read
    return attend / clock, gradients / clock + read / memory + sums / (memory * L2_SPEED)


def flops(tokens: int) -> float:
    """Of the forward's two products."""
    return 4.0 * GROUPS * HEADS * CHANNELS * (tokens * (tokens + 1) / 2 + tokens * PREFIX)


@cache
def of_cuda(sm: int) -> Kernels:
    kernels = {}
    for instance in instances([sm], "prefix_attention/attention_sm"):
        given = instance.given
        few = given.get("kWarps") == "1"
        if (given["T"], given["kChannels"], given["kWide"], few) == ("half", "128", "true", False):
            kernels[instance.kernel] = kernel_of(instance.sass, instance.warps, always=LOADING)
    turn = 16 if sm < 80 else 32
    gradients = kernels["gradients_mma_kernel"]
    keys = Walk(64, 16, loop_of(gradients, 4 * 64 * 16 * CHANNELS))
    return Kernels(
        attend=Walk(64, 16, hottest(kernels["attend_mma_kernel"])),
        queries=Walk(64, turn, loop_of(gradients, 3 * 64 * turn * CHANNELS)),
        keys=keys,
        prefix=keys,
        together=True,
    )


def loop_of(kernel: Kernel, fmas: int) -> Loop:
    """The one whose products are so many, of a block."""
    (found,) = (loop for loop in kernel.loops if loop.warps * loop.fmas == fmas)
    return found


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
