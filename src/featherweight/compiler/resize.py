"""Tables of Resize: for every position of an output axis the input positions and their weights."""

from __future__ import annotations

from typing import Any

import numpy as np


def source_positions(
    size: int, output: int, scale: float, mode: str, window: tuple[float, float] = (0.0, 1.0)
) -> np.ndarray:
    """Return where each output position lies on the input axis, in elements.

    Args:
        size: elements of the input axis.
        output: elements of the output axis.
        scale: output over input, as the node gives it.
        mode: ONNX's coordinate_transformation_mode.
        window: start and end of the region of `tf_crop_and_resize`, as shares of the axis.
    """
    x = np.arange(output, dtype=np.float64)
    length = scale * size
    if mode == "half_pixel":
        return (x + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = output / length if length else 1.0
        return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if output > 1 else np.zeros(output)
    if mode == "align_corners":
        return x * (size - 1) / (length - 1) if length != 1 else np.zeros(output)
    if mode == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if mode == "tf_crop_and_resize":
        start, end = window
        if output > 1:
            return start * (size - 1) + x * (end - start) * (size - 1) / (length - 1)
        return np.full(output, 0.5 * (start + end) * (size - 1))
    return x / scale


def nearest(positions: np.ndarray, size: int, rounding: str) -> np.ndarray:
    """Return the input element of each position, rounded as ONNX's nearest_mode says."""
    chosen = {
        "round_prefer_floor": np.ceil(positions - 0.5),
        "round_prefer_ceil": np.floor(positions + 0.5),
        "floor": np.floor(positions),
        "ceil": np.ceil(positions),
    }[rounding]
    return chosen.clip(0, size - 1).astype(np.int64)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    t = np.abs(distance)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(distance))


def taps(
    positions: np.ndarray, size: int, scale: float, attrs: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and weights `(output, taps)` of a linear or cubic resize along one axis.

    Indices beyond the ends repeat the last element; with `exclude_outside` their weight goes to the others.
    """
    cubic = attrs.get("mode") == "cubic"
    a = attrs.get("cubic_coeff_a", -0.75)
    # Downscaling with antialias widens the kernel by the scale.
    stretch = min(scale, 1.0) if attrs.get("antialias", 0) else 1.0
    support = (2.0 if cubic else 1.0) / stretch
    reach = int(np.ceil(support))
    first = np.floor(positions).astype(np.int64) - reach + 1
    indices = first[:, None] + np.arange(2 * reach)
    distance = (indices - positions[:, None]) * stretch
    weights = _cubic(distance, a) if cubic else _linear(distance)
    if attrs.get("exclude_outside", 0):
        weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
    if attrs.get("exclude_outside", 0) or stretch != 1.0:
        weights = weights / weights.sum(axis=1, keepdims=True)
    indices = indices.clip(0, size - 1)
    used = np.flatnonzero((weights != 0).any(axis=0))
    keep = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
    return indices[:, keep], weights[:, keep]
