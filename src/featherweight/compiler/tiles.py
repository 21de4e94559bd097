"""Which register tile a convolution runs on: a cost model over the tiles that fit the registers."""

from __future__ import annotations

from dataclasses import dataclass

MIN_CHAINS = 8
"""Independent multiply-adds that hide the latency of one: two a cycle, four cycles each."""

CACHE_BYTES = 2**18
"""Activations of one unit of work: well inside a second-level cache."""


@dataclass(frozen=True)
class Tile:
    """`rows` output columns by `vectors` output vectors; `last` is what the last group of vectors has."""

    rows: int
    vectors: int
    last: int


def registers(vector: int) -> int:
    """Return the vector registers of a target with this many floats a vector."""
    return 32 if vector == 16 else 16


def _tile_cost(rows: int, vectors: int) -> float:
    """Return half-cycles of one tile for one input channel: multiply-adds, loads, or their latency."""
    return max(rows * vectors, rows + vectors, MIN_CHAINS)


def candidates(columns: int, vectors: int, vector: int) -> list[Tile]:
    """Return the tiles that fit the registers and the layer."""
    room = registers(vector)
    found = []
    for wide in range(1, min(vectors, 8) + 1):
        most = min((room - 1 - wide) // wide, 15, columns)
        found += [Tile(rows, wide, vectors % wide or wide) for rows in range(1, most + 1)]
    return found


def choose_tile(columns: int, vectors: int, vector: int) -> Tile:
    """Return the cheapest tile for `columns` output columns and `vectors` output vectors."""

    def cost(tile: Tile) -> tuple[float, int]:
        passes = -(-columns // tile.rows)
        whole = vectors // tile.vectors
        rest = vectors % tile.vectors
        work = whole * _tile_cost(tile.rows, tile.vectors) + (_tile_cost(tile.rows, rest) if rest else 0)
        return passes * work, -tile.rows * tile.vectors

    return min(candidates(columns, vectors, vector), key=cost)


def depthwise_outputs(width: int, stride: int, dilation: int, vector: int) -> int:
    """Return the most output columns of a depthwise tile, 0 where no tile fits the window."""
    spread = (width - 1) * dilation + 1
    by_window = (16 - spread) // stride + 1 if spread <= 16 else 0
    return max(0, min(8, by_window, registers(vector) - width - 1))
