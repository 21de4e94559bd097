"""Convolution, normalisation and activation as one unit, and the channel rounding of mobile networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.blocks import fold

IN_PLACE = (nn.ReLU, nn.ReLU6)
"""Activations whose backward pass needs only their result, so that they may overwrite their input."""


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round a scaled channel count to a multiple of `divisor`, never losing more than a tenth.

    The rule of the MobileNets (divisor 8) and GhostNets (divisor 4).

    >>> make_divisible(24 * 0.35), make_divisible(32 * 0.35), make_divisible(16 * 1.3, 4)
    (8, 16, 20)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class ConvNormAct(nn.Module):
    """Convolution, batch normalisation, activation: the unit nearly every lightweight network repeats.

    `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))` for an odd kernel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the square kernel, in pixels; padded by half of it.
        stride: step of the kernel, in pixels.
        groups: groups of the convolution; `in_channels` makes it depthwise.
        act: class of the activation, None for a linear unit.
        bias: give the convolution a bias although a normalisation follows (some networks do).
        norm: class of the normalisation, None for none.
        momentum: momentum of the batch statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
        *,
        bias: bool = False,
        norm: type[nn.Module] | None = nn.BatchNorm2d,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )
        self.scales = (kernel_size, stride) == (1, 1) and in_channels == out_channels == groups
        self.norm = nn.Identity() if norm is None else norm(out_channels, momentum=momentum)
        # The unit's own tensor, which the backward pass of no norm and no convolution needs.
        in_place = {"inplace": True} if act in IN_PLACE else {}
        self.act = nn.Identity() if act is None else act(**in_place)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        scales = self.scales and type(self.conv) is nn.Conv2d and _runs_on_cpu(x)
        return self.act(self.norm(_scale_channels(x, self.conv) if scales else self.conv(x)))

    def fuse(self) -> None:
        """Put the batch norm into the convolution, in place; nothing happens the second time."""
        if isinstance(self.norm, fold.NORMS):
            fold.fold_after(self.conv, self.norm)
            self.norm = nn.Identity()


def _runs_on_cpu(x: Tensor) -> bool:
    """Tell whether numbers are at hand: no symbol, no meta tensor, no graph being captured."""
    capturing = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return isinstance(x, Tensor) and x.is_cpu and not capturing


def _scale_channels(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Do what a depthwise 1x1 convolution does; PyTorch's may run channel by channel, which takes long."""
    y = x * conv.weight.to(x.dtype).view(-1, 1, 1)
    return y if conv.bias is None else y + conv.bias.to(x.dtype).view(-1, 1, 1)
