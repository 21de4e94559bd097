"""Convolution, normalisation and activation as one unit, and the channel rounding of mobile networks."""

from __future__ import annotations

from torch import Tensor, nn


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
        self.norm = nn.Identity() if norm is None else norm(out_channels, momentum=momentum)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        return self.act(self.norm(self.conv(x)))
