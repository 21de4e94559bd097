"""What the hypercomplex networks are made of: the unit, the residual block, the base of the classifiers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.drop_path import DropPath
from featherweight.blocks.fold import check_eval, fold_after
from featherweight.ops.phnn import PHConv2d, PHLinear
from featherweight.registry import register_model

EXPANSION = 4


def multiple(channels: float, n: int) -> int:
    """Round a width to a multiple of n, at least n.

    >>> multiple(64, 4), multiple(64, 3), multiple(1, 4)
    (64, 63, 4)
    """
    return n * max(1, round(channels / n))


class PHUnit(nn.Module):
    """PHC convolution, batch norm and ReLU: `(N, in_channels, H, W)` to `(N, out_channels, H', W')`.

    Args:
        n: components of the hypercomplex numbers.
        in_channels: channels of the input; zero channels go in front up to a multiple of n.
        out_channels: channels of the output, a multiple of n.
        kernel_size: side of the kernel, in pixels; padded by half of it.
        stride: step of the kernel, in pixels.
        act: end with ReLU.
    """

    def __init__(
        self,
        n: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.missing = -in_channels % n
        channels = in_channels + self.missing
        self.conv: nn.Module = PHConv2d(channels, out_channels, kernel_size, stride, kernel_size // 2, n=n)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        if self.missing:
            x = F.pad(x, (0, 0, 0, 0, self.missing, 0))  # (N, n k, H, W)
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> None:
        """Become an ordinary convolution that holds the norm as well."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = self.conv.fuse()
            fold_after(self.conv, self.norm)
            self.norm = nn.Identity()


class PHBlock(nn.Module):
    """Two 3x3 units, or 1x1, 3x3 and 1x1 ones, and a shortcut.

    Args:
        n: components of the hypercomplex numbers.
        in_channels: channels of the input.
        channels: channels in the middle; the output has four times as many behind a bottleneck.
        stride: of the (first) 3x3 convolution, in pixels.
        bottleneck: use three units.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self, n: int, in_channels: int, channels: int, stride: int, bottleneck: bool, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        out = channels * EXPANSION if bottleneck else channels
        if bottleneck:
            units = [
                PHUnit(n, in_channels, channels, 1),
                PHUnit(n, channels, channels, 3, stride),
                PHUnit(n, channels, out, 1, act=False),
            ]
        else:
            units = [PHUnit(n, in_channels, channels, 3, stride), PHUnit(n, channels, out, 3, act=False)]
        self.units = nn.Sequential(*units)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out:
            self.shortcut = PHUnit(n, in_channels, out, 1, stride, act=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out, ceil(H / stride), ceil(W / stride))`."""
        return self.act(self.drop_path(self.units(x)) + self.shortcut(x))


class PHCClassifier(Classifier):
    """What the hypercomplex classifiers share."""

    def fuse(self) -> Self:
        """Turn every layer into an ordinary one and fold the norms, in place; full size, same answers.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in list(self.modules()):
            if isinstance(module, PHUnit):
                module.fuse()
            for name, child in module.named_children():
                if isinstance(child, PHLinear):
                    setattr(module, name, child.fuse())
        return self


def register(name: str, build: Callable[..., nn.Module], description: str, **settings: Any) -> None:
    """Register `build(**settings)` under a name; the caller's arguments come on top."""

    @functools.wraps(build, assigned=(), updated=())
    def variant(**kwargs: Any) -> nn.Module:
        return build(**{**settings, **kwargs})

    variant.__name__, variant.__doc__ = name, description
    register_model(variant)
