"""Tile sizes: small tables instead of an autotuner. That would need a driver to import and time to
warm up. It could choose differently on every run, and so sum in another order.

bench/results/triton_resources_*.md have the registers and shared memory each size takes on each
chip, by version of Triton.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple, TypeVar

import torch

Tile = TypeVar("Tile")


class RowTile(NamedTuple):
    """`rows` x `columns` elements of a matrix, held in the registers of one program."""

    rows: int
    columns: int
    num_warps: int


# At most 16 elements a thread: four 16-byte loads a tensor in fp32, two in half precision. The four
# tensors of a backward then take 64 of a thread's registers. Short rows share a program.
_ROW_TILES = (
    RowTile(rows=8, columns=256, num_warps=4),
    RowTile(rows=2, columns=1024, num_warps=4),
    RowTile(rows=1, columns=4096, num_warps=8),
    RowTile(rows=1, columns=8192, num_warps=16),
)
# Longer rows are walked in blocks. The walk's addresses and partial sums take registers too, so it
# has only four warps, which may have 255 a thread: at 16 warps, 128 a thread, the backward spilled.
_LONG_ROW_TILE = RowTile(rows=1, columns=2048, num_warps=4)


def row_tile(length: int) -> RowTile:
    """The tile for an op that reduces over rows of `length` elements; columns is a power of 2."""
    for tile in _ROW_TILES:
        if length <= tile.columns:
            return tile._replace(columns=1 << (length - 1).bit_length())
    return _LONG_ROW_TILE


def by_shared_memory(table: Mapping[int, Tile], device: torch.device) -> Tile:
    """The entry of `table`, whose keys are KiB of shared memory a block may have, for the most that
    the device has. The classes: 64 (any), 99 (sm_86, 89, 120), 163 (sm_80), 227 (sm_90, 100)."""
    available = shared_memory_kib(device)
    return table[max(kib for kib in table if kib <= available)]


@cache
def shared_memory_kib(device: torch.device) -> int:
    """What a block may have on `device`; off a GPU, in the interpreter, the smallest class."""
    if device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024
