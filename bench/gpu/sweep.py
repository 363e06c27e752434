"""Other tiles than ours at ChatGLM2-6B's shapes: which are faster on this GPU?

    python -m bench.gpu.sweep gemv|decode|forward|dq|dkv --rows rows.jsonl [--lock file]

Times each alternative in the place of the tile that would be chosen, cold, in float16; what has to
be compiled is before. One JSON object a line: {"sweep", "shape", "tile", "ours": whether it is the
one that is chosen, "us"}; one that this chip cannot hold says so.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from bench.clock import seconds_per_round
from bench.gpu.cases import CHATGLM2_6B, OPS, REHEARSAL, Case, Sizes, as_tuple
from bench.gpu.rows import alone, in_a_line, write_rows
from glmkern.triton_kernels.prefix_attention import backward, decode, dkv, forward
from glmkern.triton_kernels.prefix_attention.shared import AttentionTile
from glmkern.triton_kernels.quant_linear import gemv
from glmkern.triton_kernels.quant_linear.gemv import GemvTile
from glmkern.triton_kernels.tiles import shared_memory_kib

ROUNDS = 5
DTYPE = torch.float16


@dataclass(frozen=True)
class Sweep:
    """Tiles for the entry `key` of `table`, which one pass of an op takes its own from."""

    op: str
    direction: str
    table: dict
    key: Any
    tiles: Sequence[tuple]
    kind: Callable[..., Any] = AttentionTile

    def with_tile(self, tile: tuple) -> AbstractContextManager:
        return mock.patch.dict(self.table, {self.key: tile})


def sweeps(device: torch.device) -> dict[str, Sweep]:
    """With their alternatives, by name."""
    kib = max(size for size in forward.TILES if size <= shared_memory_kib(device))
    few = [(8, 128), (32, 64), (16, 64), (16, 128), (8, 256), (4, 256)]
    rows = [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)]
    late = [(*tile, True) for tile in rows]
    keys = [(64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2)]
    one = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (64, 32, 4, 3)]
    found = {"gemv": Sweep("quant_linear", "forward", gemv.FWD_TILES, 1, few, GemvTile)}
    for name, file, direction, tiles in (
        ("decode", decode, "forward", one),
        ("forward", forward, "forward", rows + late),
        ("dq", backward, "backward", rows),
        ("dkv", dkv, "backward", keys),
    ):
        table = file.TILES[kib]
        found[name] = Sweep("prefix_attention", direction, table, DTYPE.itemsize, tiles)
    return found


def run(name: str, sizes: Sizes, device: str, lock: Path | None = None) -> Iterator[dict]:
    sweep = sweeps(torch.device(device))[name]
    ours = sweep.table[sweep.key]
    tiles = list(dict.fromkeys([ours, *(sweep.kind(*tile) for tile in sweep.tiles)]))
    cases = [make() for label, make in OPS[sweep.op](sizes, DTYPE, device) if _belongs(name, label)]
    for case, tile in itertools.product(cases, tiles):  # compiles
        with contextlib.suppress(Exception), sweep.with_tile(tile):
            _call(case, sweep.direction)()
    with alone(lock):
        for case, tile in itertools.product(cases, tiles):
            print(f"{name}, {case.shape}: {tuple(tile)}", flush=True)
            row = {"sweep": name, "shape": case.shape, "tile": str(tuple(tile))}
            try:
                with sweep.with_tile(tile):
                    row["us"] = round(_seconds(case, sweep.direction, device) * 1e6, 2)
            except Exception as error:
                row["note"] = in_a_line(error)
            yield row | {"ours": tile == ours}


def _belongs(name: str, label: str) -> bool:
    """Whether a case, by its label, shows what the sweep is about."""
    if name == "gemv":
        return label.startswith("1 x") and "8 bits" not in label
    if name == "decode":
        return label.startswith("decode")
    return label in ("step", "one long sequence")


def _call(case: Case, direction: str) -> Callable[[], Any]:
    if direction == "forward":
        return lambda: case.forward(*case.args)
    args = case.args_of_backward(as_tuple(case.forward(*case.args)))
    return lambda: case.backward(*args)


def _seconds(case: Case, direction: str, device: str) -> float:
    (seconds,) = seconds_per_round([_call(case, direction)], device, ROUNDS)
    return median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("gemv", "decode", "forward", "dq", "dkv"))
    parser.add_argument("--rows", type=Path, required=True, help="the file that lines go to")
    parser.add_argument("--lock", type=Path, help="a file: of all that name it, one times at once")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    sizes = CHATGLM2_6B if args.device == "cuda" else REHEARSAL
    return write_rows(args.rows, run(args.name, sizes, args.device, args.lock))


if __name__ == "__main__":
    sys.exit(main())
