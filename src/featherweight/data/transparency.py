"""Transparency of enlarged pictures: colours under it must not bleed, and alpha is enlarged on its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from featherweight.data.bicubic import Bicubic


def fill_clear(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return a copy in which wholly transparent pixels take the colour of the nearest visible ones.

    What hides under alpha 0 is often black or white and would bleed into the edges. Colours are averaged over
    ever larger squares until one holds a visible pixel.
    """
    visible = alpha > 0
    if visible.all() or not visible.any():
        return pixels
    weight = visible.astype(np.float32)[:, :, None]
    levels = [(pixels * weight, weight)]
    while max(levels[-1][1].shape[:2]) > 1 and (levels[-1][1] == 0).any():
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    colour = levels[-1][0] / np.maximum(levels[-1][1], 1)
    for total, count in reversed(levels[:-1]):
        larger = colour.repeat(2, 0).repeat(2, 1)[: total.shape[0], : total.shape[1]]
        colour = np.where(count > 0, total / np.maximum(count, 1), larger)
    return np.where(visible[:, :, None], pixels, np.rint(colour).astype(pixels.dtype))


def _halved(array: np.ndarray) -> np.ndarray:
    """Return the sums of squares of 2 x 2."""
    height, width = array.shape[:2]
    even = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)))
    return even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]


def with_alpha(
    rows: Iterator[np.ndarray], alpha: np.ndarray, size: tuple[int, int], keep: bool
) -> Iterator[np.ndarray]:
    """Add the bicubic enlargement of alpha to each strip as a channel, or lay the strip on white."""
    resizer, start = Bicubic.of(alpha, size=size), 0
    most = np.iinfo(alpha.dtype).max
    for strip in rows:
        cover = resizer.rows(alpha, start, start + len(strip))[:, :, None]
        start += len(strip)
        if keep:
            yield np.concatenate([strip, cover], axis=2)
        else:
            share = cover.astype(np.float32) / most
            yield np.floor(strip * share + most * (1 - share) + 0.5).astype(strip.dtype)


def to_eight_bits(strip: np.ndarray) -> np.ndarray:
    """Return 16-bit pixels in 8 bits, rounded."""
    return ((strip.astype(np.uint32) + 128) // 257).astype(np.uint8)
