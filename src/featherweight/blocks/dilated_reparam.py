"""A large depthwise convolution helped in training by dilated small ones, which merge into it afterwards.

A depthwise kernel dilated by r is a dense kernel with r - 1 zeros between its weights. Padded to the size of
the large one and added to it, it costs nothing any more.

Reference: "UniRepLKNet", arXiv 2311.15599, section 3.2.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from featherweight.blocks.fold import folded, put_weights
from featherweight.errors import UsageError

DILATED = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Large kernel -> (kernel, dilation) of the small ones beside it; none reaches beyond the large one."""


class DilatedReparamBlock(nn.Module):
    """A large depthwise convolution plus dilated small ones, each with its batch norm, summed.

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
        kernel_size: side of the large kernel, a key of `DILATED`.

    Raises:
        UsageError: no set of small kernels is known for this size.

    >>> DilatedReparamBlock(8, 13).eval().fuse().kernel_size
    (13, 13)
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in DILATED:
            known = ", ".join(map(str, DILATED))
            raise UsageError(f"No dilated kernels for a side of {kernel_size}. Expected one of {known}.")
        sizes = ((kernel_size, 1), *DILATED[kernel_size])
        self.branches = nn.ModuleList(
            nn.Sequential(depthwise(channels, kernel, dilation), nn.BatchNorm2d(channels))
            for kernel, dilation in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Sum the branches."""
        out = self.branches[0](x)
        for branch in self.branches[1:]:
            out = out + branch(x)
        return out

    def fuse(self) -> nn.Conv2d:
        """Return the one convolution (with bias) that gives the same in eval mode."""
        merged, bias = folded(*self.branches[0])
        side = merged.shape[-1]
        for conv, norm in self.branches[1:]:
            weight, shift = folded(conv, norm)
            step = conv.dilation[0]
            start = (side - step * (weight.shape[-1] - 1) - 1) // 2
            # A dilated kernel is a dense one with holes, in the middle of the large one.
            merged[:, :, start : side - start : step, start : side - start : step] += weight
            bias = bias + shift
        large = copy.deepcopy(self.branches[0][0])
        put_weights(large, merged, bias)
        return large


def depthwise(channels: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    """Return a depthwise convolution without bias that keeps the size of the map."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(
        channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=False
    )
