"""Tile sizes: small tables instead of an autotuner, which would need a driver to import and time
to warm up, and could choose differently, so sum in another order, on every run.

bench/results/triton_resources.md has the registers and shared memory each size takes on each chip.
"""

from typing import NamedTuple


class RowTile(NamedTuple):
    """`rows` x `columns` elements of a matrix, held in the registers of one program."""

    rows: int
    columns: int
    num_warps: int


# At most 16 elements a thread: four 16-byte loads a tensor in fp32, two in half precision, and the
# four tensors of a backward in 64 of a thread's registers. Short rows share a program.
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
