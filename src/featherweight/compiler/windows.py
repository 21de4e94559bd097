"""Geometry of convolutions and pools: kernel, strides, dilations and resolved paddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Sizes along the spatial axes, in elements."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Elements of the kernel."""
        return math.prod(self.kernel)


def conv_window(
    attrs: dict[str, Any], kernel: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> Window:
    """Return the window of a convolution or pool from its attributes and shapes."""
    rank = len(inputs)
    strides = tuple(attrs.get("strides") or [1] * rank)
    dilations = tuple(attrs.get("dilations") or [1] * rank)
    pads = list(attrs.get("pads") or [0] * 2 * rank)
    before, after = pads[:rank], pads[rank:]
    mode = attrs.get("auto_pad", "NOTSET")
    if mode == "VALID":
        before, after = [0] * rank, [0] * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        for axis in range(rank):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max((outputs[axis] - 1) * strides[axis] + reach - inputs[axis], 0)
            small = total // 2
            before[axis] = small if mode == "SAME_UPPER" else total - small
            after[axis] = total - before[axis]
    return Window(
        tuple(kernel), strides, dilations, tuple(before), tuple(after), tuple(inputs), tuple(outputs)
    )


def transposed_window(
    attrs: dict[str, Any], kernel: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> Window:
    """Return the window of a transposed convolution: `before` is what is cut at the start of each axis."""
    rank = len(inputs)
    strides = tuple(attrs.get("strides") or [1] * rank)
    dilations = tuple(attrs.get("dilations") or [1] * rank)
    extra = list(attrs.get("output_padding") or [0] * rank)
    pads = list(attrs.get("pads") or [0] * 2 * rank)
    mode = attrs.get("auto_pad", "NOTSET")
    before = pads[:rank]
    if mode != "NOTSET" or attrs.get("output_shape"):
        for axis in range(rank):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = strides[axis] * (inputs[axis] - 1) + extra[axis] + reach - outputs[axis]
            # ONNX puts the odd element at the end only for SAME_UPPER.
            before[axis] = total // 2 if mode == "SAME_UPPER" else total - total // 2
            before[axis] = 0 if mode == "VALID" else before[axis]
    return Window(
        tuple(kernel), strides, dilations, tuple(before), (0,) * rank, tuple(inputs), tuple(outputs)
    )
