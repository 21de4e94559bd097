"""Order the weights of float32 kernels as `kernels/conv.h` and `kernels/depthwise.h` read them.

Every function takes the vector length `lanes` (VL) of the target and pads channels with zeros to whole
vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grouping:
    """Which input channels the vectors of a convolution read.

    Attributes:
        depth: input channels of a tap (`fw_conv.depth`).
        first: first input channel of each group of NR vectors (`fw_conv.first`), None for a dense layer.
    """

    depth: int
    first: tuple[int, ...] | None


@dataclass(frozen=True)
class Span:
    """Equal depthwise tiles side by side: R, LO, HI of the tile, then the fields of `fw_depthwise_span`."""

    outputs: int
    low: int
    high: int
    count: int
    column: int
    columns: int
    in_column: int
    in_columns: int


def vectors_of(channels: int, lanes: int) -> int:
    """Return how many vectors hold the channels."""
    return -(-channels // lanes)


def pad_channels(values: np.ndarray, lanes: int) -> Floats:
    """Return per-channel values (C,), a bias say, as float32 padded with zeros to whole vectors."""
    padded = np.zeros(vectors_of(len(values), lanes) * lanes, np.float32)
    padded[: len(values)] = values
    return padded


def conv_groups(outputs: int, inputs: int, groups: int, lanes: int, tile_vectors: int) -> Grouping:
    """Return which input channels each group of `tile_vectors` (NR) output vectors reads.

    Args:
        outputs: output channels.
        inputs: input channels.
        groups: groups of the convolution; 1 is dense.
        lanes: VL.
        tile_vectors: NR of the kernel.
    """
    if groups == 1:
        return Grouping(inputs, None)
    wide, narrow = outputs // groups, inputs // groups
    step = tile_vectors * lanes
    ranges = [
        (start // wide * narrow, ((min(start + step, outputs) - 1) // wide + 1) * narrow)
        for start in range(0, outputs, step)
    ]
    depth = max(high - low for low, high in ranges)
    return Grouping(depth, tuple(min(low, inputs - depth) for low, _ in ranges))


def conv_weights(weight: np.ndarray, lanes: int, tile_vectors: int, groups: int = 1) -> Floats:
    """Pack a convolution's weights for a kernel with NR = `tile_vectors`.

    Args:
        weight: (O, I / groups, kernel height, kernel width).
        lanes: VL.
        tile_vectors: NR.
        groups: groups of the convolution.

    Returns:
        One row of floats: for each group of NR vectors [tap row][tap column][k][vector][VL].
    """
    outputs, narrow, height, width = weight.shape
    grouping = conv_groups(outputs, narrow * groups, groups, lanes, tile_vectors)
    taps = weight.transpose(2, 3, 1, 0)  # (height, width, I / groups, O)
    panels = []
    for index, start in enumerate(range(0, outputs, tile_vectors * lanes)):
        stop = min(start + tile_vectors * lanes, outputs)
        panel = np.zeros((height, width, grouping.depth, vectors_of(stop - start, lanes) * lanes), np.float32)
        if grouping.first is None:
            panel[..., : stop - start] = taps[..., start:stop]
        else:
            for channel in range(start, stop):
                low = channel // (outputs // groups) * narrow - grouping.first[index]
                panel[:, :, low : low + narrow, channel - start] = taps[..., channel]
        panels.append(panel.ravel())
    return np.concatenate(panels)


def depthwise_weights(weight: np.ndarray, lanes: int) -> Floats:
    """Pack depthwise weights (C, 1, height, width) as [vector][tap row][tap column][VL]."""
    channels, _, height, width = weight.shape
    padded = np.zeros((vectors_of(channels, lanes) * lanes, height, width), np.float32)
    padded[:channels] = weight[:, 0]
    return padded.reshape(-1, lanes, height, width).transpose(0, 2, 3, 1).ravel()


def depthwise_spans(
    columns: int, in_columns: int, width: int, stride: int, dilation: int, pad_left: int, most: int = 8
) -> list[Span]:
    """Cut a row of depthwise outputs into runs of equal tiles.

    Args:
        columns: output columns.
        in_columns: input columns.
        width: kernel width.
        stride: columns from an output's window to the next.
        dilation: columns from a tap to the next.
        pad_left: columns of zeros before the input.
        most: the most outputs of a tile.
    """
    tiles = -(-columns // most)
    sizes = [columns // tiles + (index < columns % tiles) for index in range(tiles)]
    spans: list[Span] = []
    column = 0
    for size in sizes:
        start = column * stride - pad_left
        low = max(0, -start)
        high = min((size - 1) * stride + (width - 1) * dilation + 1, in_columns - start)
        previous = spans[-1] if spans else None
        if previous and (previous.outputs, previous.low, previous.high) == (size, low, high):
            spans[-1] = Span(**{**vars(previous), "count": previous.count + 1})
        else:
            inside = min(max(start + low, 0), in_columns - 1)
            spans.append(Span(size, low, high, 1, column, size, inside, size * stride))
        column += size
    return spans
