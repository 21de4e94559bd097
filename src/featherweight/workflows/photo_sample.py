"""A sample of a picture before and after, taken while the result passes by in strips."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from featherweight.data.bicubic import imresize
from featherweight.data.transparency import to_eight_bits

CROP = 96
"""Side of the sample in pixels of the picture."""


class Sample:
    """Cuts the liveliest square out of a picture, and the same square out of the result as it passes."""

    def __init__(self, pixels: np.ndarray, factor: float) -> None:
        height, width = (min(CROP, side) for side in pixels.shape[:2])
        top, left = liveliest(pixels, height, width)
        self._before = pixels[top : top + height, left : left + width]
        self._top, self._left = round(top * factor), round(left * factor)
        self._size = (round(height * factor), round(width * factor))
        self._kept: list[np.ndarray] = []

    def watch(self, rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Pass the strips on."""
        start = 0
        for strip in rows:
            low, high = max(self._top - start, 0), self._top + self._size[0] - start
            if high > 0 and low < len(strip):
                self._kept.append(strip[low:high, self._left : self._left + self._size[1]].copy())
            start += len(strip)
            yield strip

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bicubic enlargement of the square, and the result's, both in 8 bits."""
        after = np.concatenate(self._kept)
        before = imresize(self._before, size=after.shape[:2])
        return tuple(to_eight_bits(part) if part.dtype == np.uint16 else part for part in (before, after))


def liveliest(pixels: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Return top and left of the square whose brightness varies most from pixel to pixel."""
    grey = pixels.mean(axis=2, dtype=np.float32)
    change = np.zeros(grey.shape)
    change[1:] += np.abs(np.diff(grey, axis=0))
    change[:, 1:] += np.abs(np.diff(grey, axis=1))
    best, place = -1.0, (0, 0)
    for top in {*range(0, grey.shape[0] - height, max(height // 2, 1)), grey.shape[0] - height}:
        for left in {*range(0, grey.shape[1] - width, max(width // 2, 1)), grey.shape[1] - width}:
            score = float(change[top : top + height, left : left + width].sum())
            if (score, (-top, -left)) > (best, (-place[0], -place[1])):
                best, place = score, (top, left)
    return place
