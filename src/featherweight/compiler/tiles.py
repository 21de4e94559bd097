"""Which register tile a product runs on: by a cost model over those that fit, or as measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from featherweight.compiler.alternatives import Alternatives

MIN_CHAINS = 8
"""Independent multiply-adds that hide the latency of one: two a cycle, four cycles each."""

LOAD, LOOP, VECTOR = 1.2, 1.0, 0.7
"""Half-cycles of a load, of the loop, and of one more vector of weights: fitted to 16 tiles on 21 shapes.
The tiles chosen so take 2.4 % longer than the best on average and 6 % at most."""

MOST_ROWS, MOST_VECTORS = 15, 8
CACHE_BYTES = 2**18
"""Activations of one unit of work: well inside a second-level cache."""


@dataclass(frozen=True)
class Tile:
    """`rows` output columns by `vectors` output vectors; `last` is what the last group of vectors has."""

    rows: int
    vectors: int
    last: int


@dataclass
class Tiles:
    """Chooses the tile of each layer.

    Attributes:
        known: measured choices, (rows, vectors) by the layer's key.
        rank: which candidate a layer without a measured choice gets, 0 for the cheapest by the model.
        seen: the tile that each key got.
        alternatives: chooses the forms of the network's parts.
    """

    known: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rank: int = 0
    seen: dict[str, Tile] = field(default_factory=dict)
    alternatives: Alternatives = field(default_factory=Alternatives)

    def choose(self, key: str, columns: int, vectors: int, vector: int, integer: bool = False) -> Tile:
        """Return the tile of a layer.

        Args:
            key: names the layer's shape.
            columns: output columns that follow each other.
            vectors: output vectors, or blocks of 16 outputs of an 8-bit layer.
            vector: floats of a vector register of the target.
            integer: whether it is an 8-bit layer.
        """
        ranked = rank_tiles(columns, vectors, vector, integer)
        tile = ranked[min(self.rank, len(ranked) - 1)]
        if key in self.known:
            rows, wide = self.known[key]
            tile = next(
                (
                    own
                    for own in _fitting(columns, vectors, vector, integer)
                    if (own.rows, own.vectors) == (rows, wide)
                ),
                tile,
            )
        self.seen[key] = tile
        return tile


def registers(vector: int) -> int:
    """Return the vector registers of a target with this many floats a vector."""
    return 32 if vector == 16 else 16


def _tile_cost(rows: int, vectors: int) -> float:
    """Return half-cycles of one tile for one input channel: multiply-adds, loads or latency, and the rest."""
    return max(rows * vectors, LOAD * (rows + vectors), MIN_CHAINS) + LOOP + VECTOR * vectors


def _cost(tile: Tile, columns: int, vectors: int) -> float:
    passes = -(-columns // tile.rows)
    whole, rest = divmod(vectors, tile.vectors)
    return passes * (
        whole * _tile_cost(tile.rows, tile.vectors) + (_tile_cost(tile.rows, rest) if rest else 0)
    )


def _fitting(columns: int, vectors: int, vector: int, integer: bool) -> list[Tile]:
    """Return the tiles that fit the registers and the layer."""
    room = registers(vector)
    found = []
    for wide in range(1, min(vectors, MOST_VECTORS) + 1):
        most = min((room - 1 - wide) // wide, MOST_ROWS, columns)
        if integer and vector < 16:
            # Two registers hold 16 sums; the portable form keeps few of them.
            most = min(most, max((6 if vector == 8 else 4) // wide, 1))
        found += [Tile(rows, wide, vectors % wide or wide) for rows in range(1, most + 1)]
    return found


def rank_tiles(columns: int, vectors: int, vector: int, integer: bool = False) -> list[Tile]:
    """Return for each number of vectors its cheapest tile, the cheapest of all first.

    >>> rank_tiles(784, 2, 16)[0]
    Tile(rows=14, vectors=2, last=2)
    """
    best: dict[int, tuple[float, int, Tile]] = {}
    for tile in _fitting(columns, vectors, vector, integer):
        rating = (_cost(tile, columns, vectors), -tile.rows * tile.vectors, tile)
        if tile.vectors not in best or rating[:2] < best[tile.vectors][:2]:
            best[tile.vectors] = rating
    return [tile for _, _, tile in sorted(best.values(), key=lambda rating: rating[:2])]


def depthwise_outputs(width: int, stride: int, dilation: int, vector: int) -> int:
    """Return the most output columns of a depthwise tile, 0 where no tile fits the window."""
    spread = (width - 1) * dilation + 1
    by_window = (16 - spread) // stride + 1 if spread <= 16 else 0
    return max(0, min(8, by_window, registers(vector) - width - 1))
