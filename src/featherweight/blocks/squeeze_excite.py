"""Squeeze-and-excitation: weigh each channel by a gate computed from the mean of all channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Multiply each channel by a gate between 0 and 1 (arXiv 1709.01507, section 3).

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
        reduced: channels in the middle of the gate.
        act: class of the activation in the middle.
        gate: class of the gate's activation; the hard sigmoid of the mobile networks by default.
    """

    def __init__(
        self,
        channels: int,
        reduced: int,
        act: type[nn.Module] = nn.ReLU,
        gate: type[nn.Module] = nn.Hardsigmoid,
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.act = act()
        self.expand = nn.Conv2d(reduced, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        squeezed = F.adaptive_avg_pool2d(x, 1)  # (N, C, 1, 1)
        return x * self.gate(self.expand(self.act(self.reduce(squeezed))))
