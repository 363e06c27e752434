"""Other tiles than ours at ChatGLM2-6B's shapes: which are faster on this GPU?

    python -m bench.gpu.sweep --rows rows.jsonl

Times each alternative in the place of the tile that would be chosen, cold, in float16. One JSON
object a line: {"sweep", "shape", "tile", "ours": whether it is the one that is chosen, "us"}; one
that this chip cannot hold says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from bench.clock import seconds_per_round
from bench.gpu.cases import CHATGLM2_6B, OPS, REHEARSAL, Case, Sizes
from bench.gpu.rows import in_a_line, write_rows
from glmkern.triton_kernels.prefix_attention import backward, decode, dkv, forward
from glmkern.triton_kernels.prefix_attention.shared import AttentionTile
from glmkern.triton_kernels.quant_linear import gemv
from glmkern.triton_kernels.quant_linear.gemv import GemvTile
from glmkern.triton_kernels.tiles import shared_memory_kib

ROUNDS = 5
DTYPE = torch.float16


@dataclass(frozen=True)
class Sweep:
    """Tiles for the entry `key` of `table`, which belongs to the pass of the cases of `op` whose
    shape begins with `shape`."""

    name: str
    op: str
    shape: str
    direction: str
    table: dict
    key: Any
    tiles: Sequence[tuple]
    kind: Callable[..., Any] = AttentionTile


def sweeps(device: torch.device) -> list[Sweep]:
    """With their alternatives, ours among them."""
    kib = max(size for size in forward.TILES if size <= shared_memory_kib(device))
    few = [(8, 128), (32, 64), (16, 64), (16, 128), (8, 256), (4, 256)]
    rows = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)]
    late = [(*tile, True) for tile in rows]
    keys = [(64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2)]
    one = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (64, 32, 4, 3)]
    found = [Sweep("gemv", "quant_linear", "1 x", "forward", gemv.FWD_TILES, 1, few, GemvTile)]
    for name, file, direction, tiles in (
        ("attention forward", forward, "forward", rows + late),
        ("attention dq", backward, "backward", rows),
        ("attention dk, dv, dprefix", dkv, "backward", keys),
    ):
        table = file.TILES[kib]
        found.append(Sweep(name, "prefix_attention", "", direction, table, DTYPE.itemsize, tiles))
    table = decode.TILES[kib]
    found.append(
        Sweep("attention decode", "prefix_attention", "", "forward", table, DTYPE.itemsize, one)
    )
    return found


def run(sizes: Sizes, device: str) -> Iterator[dict]:
    for sweep in sweeps(torch.device(device)):
        ours = sweep.table[sweep.key]
        for label, make in OPS[sweep.op](sizes, DTYPE, device):
            if not _belongs(sweep, label):
                continue
            case = make()
            for tile in dict.fromkeys([ours, *(sweep.kind(*tile) for tile in sweep.tiles)]):
                print(f"{sweep.name}, {case.shape}: {tuple(tile)}", flush=True)
                row = {"sweep": sweep.name, "shape": case.shape, "tile": str(tuple(tile))}
                try:
                    with mock.patch.dict(sweep.table, {sweep.key: tile}):
                        row["us"] = round(_seconds(case, sweep.direction, device) * 1e6, 2)
                except Exception as error:
                    row["note"] = in_a_line(error)
                yield row | {"ours": tile == ours}


def _belongs(sweep: Sweep, label: str) -> bool:
    if sweep.op != "prefix_attention":
        return label.startswith(sweep.shape) and "8 bits" not in label
    is_decode = label.startswith("decode")
    return is_decode == (sweep.name == "attention decode") and "ragged" not in label


def _seconds(case: Case, direction: str, device: str) -> float:
    results = case.forward(*case.args)
    call = lambda: case.forward(*case.args)  # noqa: E731 (or the backward, below)
    if direction == "backward":
        up = [torch.randn_like(results[0])]
        args = case.backward_args(case.args, results, up)
        call = lambda: case.backward(*args)  # noqa: E731
    (seconds,) = seconds_per_round([call], device, ROUNDS)
    return median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    sizes = CHATGLM2_6B if args.device == "cuda" else REHEARSAL
    return write_rows(args.rows, run(sizes, args.device))


if __name__ == "__main__":
    sys.exit(main())
