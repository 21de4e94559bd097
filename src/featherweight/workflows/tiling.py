"""Restore a picture of any size in tiles that fit memory, with the result of the whole.

Tiles overlap by the network's margin, and only their cores are kept. A network that averages over the whole
picture (channel attention) would see another average in every tile: its averages become inputs, found
beforehand by running over the picture until they hold still, so that all tiles share those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from featherweight.data.bicubic import Bicubic
from featherweight.workflows.restorers import Restorer, Runner

TILE = 384
"""Side of a tile in pixels where none is asked for: margins cost 1.2 to 1.4 times, maps about 0.5 GB."""

SAMPLED = 8
"""Tiles in the first look at the averages of the whole."""

MAX_ROUNDS, EXPECTED_ROUNDS = 5, 2
SETTLED = 0.1
"""Rounds end when no average moves by more than this share of the largest of its layer; the next would
move it by about a seventh of that."""

_LUMA = np.float32([0.299, 0.587, 0.114])
Progress = Callable[[int], None]
"""Called with the pixels of the result that were done since the last call."""


@dataclass(frozen=True)
class Window:
    """One tile along one axis: pixels `start` to `stop` are seen, `first` to `last` are kept."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """How a picture is cut: windows of rows and of columns."""

    rows: tuple[Window, ...]
    columns: tuple[Window, ...]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.rows) * len(self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of every tile."""
        return self.rows[0].stop, self.columns[0].stop


def windows(length: int, tile: int, margin: int) -> tuple[Window, ...]:
    """Cut an axis; every window is of the same size and touches the true edge at both ends.

    >>> [(w.start, w.stop, w.first, w.last) for w in windows(20, 12, 2)]
    [(0, 12, 0, 10), (8, 20, 10, 20)]
    """
    if length <= tile:
        return (Window(0, length, 0, length),)
    found, first = [], 0
    while first < length:
        start = min(max(first - margin, 0), length - tile)
        last = length if start + tile == length else start + tile - margin
        found.append(Window(start, start + tile, first, last))
        first = last
    return tuple(found)


def plan_tiles(
    restorer: Restorer, height: int, width: int, tile: int | None, margin: int, memory: int
) -> Plan:
    """Choose the tiles of a picture.

    Args:
        restorer: the network.
        height: of the picture in pixels, a multiple of what the network needs.
        width: likewise.
        tile: side in pixels; 0 for the whole picture at once; None chooses: the whole where it is no larger
            than a tile, or where averages over it are needed and it fits the memory.
        margin: overlap on each side in pixels.
        memory: bytes that the maps may take.
    """
    if restorer.fixed:
        sides = restorer.fixed
    elif tile is None:
        affordable = int((memory / restorer.bytes_per_pixel) ** 0.5)
        side = max(min(TILE, affordable), 2 * margin + 32)
        whole_fits = height * width * restorer.bytes_per_pixel <= memory
        global_ = restorer.reach.statistics or restorer.reach.unshared
        sides = (height, width) if whole_fits and (global_ or height * width <= side**2) else (side, side)
    else:
        sides = (tile or height, tile or width)
    step = restorer.multiple
    rows, columns = (-(-side // step) * step for side in sides)
    margin = -(-margin // step) * step
    return Plan(windows(height, rows, margin), windows(width, columns, margin))


class Tiles:
    """Restores one picture.

    Args:
        pixels: (H, W, C) of uint8 or uint16, C of 1 or 3, upright.
        runner: the network on its engine.
        tile: as `plan_tiles`.
        margin: overlap in pixels, None for the network's own.
        memory: bytes that maps may take.
    """

    def __init__(
        self, pixels: np.ndarray, runner: Runner, tile: int | None, margin: int | None, memory: int
    ) -> None:
        self.pixels, self.runner, self.restorer = pixels, runner, runner.restorer
        least = self.restorer.fixed or (1, 1)
        step = self.restorer.multiple
        height, width = (
            max(-(-side // step) * step, low) for side, low in zip(pixels.shape[:2], least, strict=True)
        )
        extra = ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0))
        self._padded = np.pad(pixels, extra, "edge") if height + width > sum(pixels.shape[:2]) else pixels
        margin = self.restorer.margin if margin is None else margin
        self.plan = plan_tiles(self.restorer, height, width, tile, margin, memory)
        self.rounds = 0
        self._statistics: list[np.ndarray] = []
        self._shares = self.plan.tiles > 1 and bool(self.restorer.reach.statistics)

    def strips(self, progress: Progress | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the result from the top down, (rows, W * scale, C) in the picture's own type."""
        run, scale = self._open(), self.restorer.scale
        left = 1.0
        if self._shares:
            self._statistics = self._find_statistics(run, progress)
            left -= min(self.rounds, EXPECTED_ROUNDS) / (EXPECTED_ROUNDS + 1)
        height, width, channels = self.pixels.shape
        for rows in self.plan.rows:
            last = min(rows.last, height)
            if last <= rows.first:
                return
            strip = np.empty(((last - rows.first) * scale, width * scale, channels), self.pixels.dtype)
            for columns in self.plan.columns:
                right = min(columns.last, width)
                if right <= columns.first:
                    continue
                restored = run(self._feeds(rows, columns))[0][0]
                top, side = (rows.first - rows.start) * scale, (columns.first - columns.start) * scale
                core = restored[
                    :,
                    top : top + (last - rows.first) * scale,
                    side : side + (right - columns.first) * scale,
                ]
                strip[:, columns.first * scale : right * scale] = self._as_pixels(
                    core, rows.first * scale, columns.first * scale
                )
                if progress:
                    progress(round(left * core.shape[1] * core.shape[2]))
            yield strip

    def _open(self) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
        form = "shared" if self._shares else "plain"
        return self.runner.open(form, *self.plan.shape, self.plan.tiles * (3 if self._shares else 1))

    def _tile(self, rows: Window, columns: Window) -> np.ndarray:
        """Return one tile as the network reads it, (1, C, h, w) with values from 0 to 1."""
        part = self._padded[rows.start : rows.stop, columns.start : columns.stop]
        scaled = part.astype(np.float32) / np.float32(np.iinfo(part.dtype).max)
        if self.restorer.channels == 1 and scaled.shape[2] == 3:
            scaled = scaled @ _LUMA[:, None]
        elif self.restorer.channels == 3 and scaled.shape[2] == 1:
            scaled = np.repeat(scaled, 3, 2)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])

    def _feeds(self, rows: Window, columns: Window) -> dict[str, np.ndarray]:
        feeds = {self.restorer.input_name: self._tile(rows, columns)}
        if self._shares:
            feeds |= {f"statistic_{index}": value for index, value in enumerate(self._statistics)}
            for jump in {entry.jump for entry in self.restorer.reach.statistics}:
                feeds[f"mask_{jump}"] = self._mask(rows, columns, jump)
        return feeds

    def _mask(self, rows: Window, columns: Window, jump: int) -> np.ndarray:
        """Return (1, 1, h, w) with ones at the positions of a map that lie in the core."""
        height, width = (-(-side // jump) for side in self.plan.shape)
        mask = np.zeros((1, 1, height, width), np.float32)
        down, across = (
            slice((window.first - window.start) // jump, -(-(window.last - window.start) // jump))
            for window in (rows, columns)
        )
        mask[:, :, down, across] = 1
        return mask

    def _as_pixels(self, core: np.ndarray, top: int, left: int) -> np.ndarray:
        """Return (C, h, w) of the network as rows of pixels in the picture's own type."""
        colour = core.transpose(1, 2, 0)
        channels = self.pixels.shape[2]
        most = np.float32(np.iinfo(self.pixels.dtype).max)
        if channels == 1 and colour.shape[2] == 3:
            colour = colour @ _LUMA[:, None]
        elif channels == 3 and colour.shape[2] == 1:
            # The network made the luma; the colour around it is bicubic.
            smooth = self._bicubic(top, left, *colour.shape[:2]) / most
            colour = smooth + (colour - smooth @ _LUMA[:, None])
        return np.floor(np.clip(colour, 0, 1) * most + np.float32(0.5)).astype(self.pixels.dtype)

    def _bicubic(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        resizer = Bicubic.of(self.pixels, self.restorer.scale)
        part = Bicubic(resizer.vertical, resizer.horizontal.slice(left, left + width), True)
        return part.rows(self.pixels, top, top + height).astype(np.float32)

    def _find_statistics(
        self, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]], progress: Progress | None
    ) -> list[np.ndarray]:
        """Return the averages over the whole picture that the network's layers would see untiled.

        Layers depend on one another's averages. Each round over the picture with the averages of the round
        before brings them nearer by a factor of about seven; a sample of tiles gives the first.
        """
        pairs = [(rows, columns) for rows in self.plan.rows for columns in self.plan.columns]
        sample = pairs[:: max(1, len(pairs) // SAMPLED)]
        alone = self.runner.open("averages", *self.plan.shape, len(sample))
        found = [alone({self.restorer.input_name: self._tile(*pair)})[1:] for pair in sample]
        self._statistics = [
            np.mean(values, axis=0, dtype=np.float64).astype(np.float32)
            for values in zip(*found, strict=True)
        ]
        for self.rounds in range(1, MAX_ROUNDS + 1):
            new = self._averages(run, pairs)
            moved = max(
                float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))
                for a, b in zip(self._statistics, new, strict=True)
            )
            self._statistics = new
            if progress and self.rounds <= EXPECTED_ROUNDS:
                height, width = (side * self.restorer.scale for side in self.pixels.shape[:2])
                progress(height * width // (EXPECTED_ROUNDS + 1))
            if moved < SETTLED:
                break
        return self._statistics

    def _averages(
        self,
        run: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
        pairs: Sequence[tuple[Window, Window]],
    ) -> list[np.ndarray]:
        entries = self.restorer.reach.statistics
        totals = [np.zeros((1, entry.channels, 1, 1)) for entry in entries]
        counts = [0.0] * len(entries)
        for rows, columns in pairs:
            feeds = self._feeds(rows, columns)
            for index, (entry, share) in enumerate(zip(entries, run(feeds)[1:], strict=True)):
                mask = feeds[f"mask_{entry.jump}"]
                totals[index] += share.astype(np.float64) * mask.size
                counts[index] += float(mask.sum())
        return [(total / count).astype(np.float32) for total, count in zip(totals, counts, strict=True)]
