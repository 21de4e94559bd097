"""Bicubic resizing as MATLAB's `imresize` does it: what low-resolution test images are made with.

The kernel is Keys' cubic with a = -0.5 (R. Keys, "Cubic convolution interpolation for digital image
processing", IEEE TASSP 1981), widened by the factor when an image shrinks (antialiasing). The axis that
shrinks more goes first, and an integer image is rounded between the two axes, as MATLAB's compiled kernel
does. Beyond an edge, the releases of MATLAB that made the usual test sets repeat the edge pixel, later ones
mirror the image: `edge` chooses. With `"replicate"` the low-resolution images of Set5 come out exactly.
Imports numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from featherweight.errors import UsageError

EDGES = ("replicate", "mirror")
_CHUNK_VALUES = 1 << 22
"""Float64 values of one strip of the result: 32 MB, whatever the image's size."""


def imresize(
    image: np.ndarray,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    antialias: bool = True,
    edge: str = "replicate",
) -> np.ndarray:
    """Return `image` resized by MATLAB's bicubic rule, in its own number type.

    Args:
        image: pixels (H, W) or (H, W, C); uint8, uint16 or floats of any range.
        scale: factor of both axes; the result is ceil(scale * H) by ceil(scale * W).
        size: height and width of the result instead of a factor.
        antialias: widen the kernel where the image shrinks.
        edge: `"replicate"` as MATLAB up to about 2010 and the usual test sets, `"mirror"` as later releases.

    Raises:
        UsageError: neither or both of scale and size are given, one is not above 0, the edge is unknown, or
            the array is no image.

    >>> imresize(np.full((8, 6), 7, np.uint8), 0.5).tolist()
    [[7, 7, 7], [7, 7, 7], [7, 7, 7], [7, 7, 7]]
    """
    resizer = Bicubic.of(image, scale, size, antialias, edge)
    height, width = resizer.size
    result = np.empty((height, width, *image.shape[2:]), image.dtype)
    channels = math.prod(image.shape[2:])
    step = max(1, _CHUNK_VALUES // (max(width, image.shape[1]) * channels))
    for start in range(0, height, step):
        stop = min(start + step, height)
        result[start:stop] = resizer.rows(image, start, stop)
    return result


@dataclass(frozen=True)
class Bicubic:
    """The weights of one resizing, so that a large result can be made some rows at a time.

    Args:
        vertical: sources and weights of each row of the result.
        horizontal: sources and weights of each column.
        vertical_first: whether the rows are resized before the columns.
    """

    vertical: Taps
    horizontal: Taps
    vertical_first: bool

    @classmethod
    def of(
        cls,
        image: np.ndarray,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        antialias: bool = True,
        edge: str = "replicate",
    ) -> Bicubic:
        """Prepare the resizing of `image`; the arguments are those of `imresize`.

        Raises:
            UsageError: as `imresize`.
        """
        if image.ndim not in (2, 3) or 0 in image.shape or image.dtype.kind not in "uf":
            raise UsageError(
                f"Cannot resize an array of shape {image.shape} and type {image.dtype}. "
                "Expected (H, W) or (H, W, C) of uint8, uint16 or floats."
            )
        if edge not in EDGES:
            raise UsageError(f"Edge '{edge}' is unknown. Expected one of {', '.join(EDGES)}.")
        height, width = image.shape[:2]
        if (scale is None) == (size is None):
            raise UsageError("Give either a scale or a size to resize to.")
        if size is None:
            assert scale is not None
            if not (math.isfinite(scale) and scale > 0):
                raise UsageError(f"Scale is {scale}. Expected a number above 0.")
            size = (_ceil(scale * height), _ceil(scale * width))
            scales = (scale, scale)
        else:
            if min(size) < 1:
                raise UsageError(f"Size is {size}. Expected at least 1 x 1.")
            scales = (size[0] / height, size[1] / width)
        return cls(
            Taps.of(height, size[0], scales[0], antialias, edge),
            Taps.of(width, size[1], scales[1], antialias, edge),
            scales[0] <= scales[1],
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return len(self.vertical.weights), len(self.horizontal.weights)

    def rows(self, image: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of the result, in the image's number type."""
        taps = self.vertical.slice(start, stop)
        if self.vertical_first:
            return _along_columns(taps.apply(image), self.horizontal)
        low, high = int(taps.sources.min()), int(taps.sources.max()) + 1
        strip = _along_columns(image[low:high], self.horizontal)
        return Taps(taps.sources - low, taps.weights).apply(strip)


@dataclass(frozen=True)
class Taps:
    """For each position of a resized axis: the source positions (out, taps) and their weights, of sum 1."""

    sources: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, length: int, out_length: int, scale: float, antialias: bool, edge: str) -> Taps:
        """Compute the taps of one axis."""
        shrink = min(scale, 1.0) if antialias else 1.0
        width = 4 / shrink
        # MATLAB counts pixels from 1 and puts their centres on whole numbers.
        centres = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)
        first = np.floor(centres - width / 2)
        sources = first[:, None] + np.arange(math.ceil(width) + 2)
        weights = shrink * _cubic(shrink * (centres[:, None] - sources))
        weights /= weights.sum(axis=1, keepdims=True)
        used = (weights != 0).any(axis=0)
        inside = sources[:, used].astype(np.int64) - 1
        if edge == "mirror":
            inside %= 2 * length
            inside = np.minimum(inside, 2 * length - 1 - inside)
        return cls(inside.clip(0, length - 1), weights[:, used])

    def slice(self, start: int, stop: int) -> Taps:
        """Return the taps of some positions only."""
        return Taps(self.sources[start:stop], self.weights[start:stop])

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return `image` resized along its first axis, rounded to its number type."""
        shape = (-1, *[1] * (image.ndim - 1))
        total = np.zeros((len(self.sources), *image.shape[1:]))
        for sources, weights in zip(self.sources.T, self.weights.T, strict=True):
            total += weights.reshape(shape) * image[sources]
        return _as_type(total, image.dtype)


def _along_columns(image: np.ndarray, taps: Taps) -> np.ndarray:
    return taps.apply(image.swapaxes(0, 1)).swapaxes(0, 1)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel, equation (15) with a = -0.5."""
    near = np.abs(x)
    squared, cubed = near**2, near**3
    inner = 1.5 * cubed - 2.5 * squared + 1
    outer = -0.5 * cubed + 2.5 * squared - 4 * near + 2
    return np.where(near <= 1, inner, np.where(near <= 2, outer, 0.0))


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round half up (values are positive after clipping) and clip, for integers; floats may overshoot."""
    if dtype.kind == "f":
        return values.astype(dtype, copy=False)
    np.clip(values, 0, np.iinfo(dtype).max, out=values)
    values += 0.5
    return np.floor(values, out=values).astype(dtype)


def _ceil(value: float) -> int:
    """Round up, except where only the division's rounding error lies above a whole number."""
    whole = round(value)
    return max(whole if abs(value - whole) < 1e-9 * max(whole, 1) else math.ceil(value), 1)
