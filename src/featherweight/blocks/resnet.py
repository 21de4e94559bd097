"""Residual networks: the host that operators are shown in.

The stem for large images is a 7x7 convolution and a max pooling, the one for small images a 3x3 convolution
that keeps every pixel. A bottleneck strides in its 3x3 convolution, as torchvision's does.

Reference: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, tables 1 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.layouts import rename

WIDTHS = (64, 128, 256, 512)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3 and 1x1 (a bottleneck), plus the input.

    `(N, in_channels, H, W)` to `(N, expansion * channels, ceil(H / stride), ceil(W / stride))`.

    Args:
        in_channels: channels of the input.
        channels: channels inside.
        stride: of the (first) 3x3 convolution, in pixels.
        expansion: 1 for two 3x3 convolutions; more for a bottleneck that widens so much at its end.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, expansion: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        out = expansion * channels
        if expansion == 1:
            self.conv1 = ConvNormAct(in_channels, channels, 3, stride)
            self.conv2 = ConvNormAct(channels, out, 3, act=None)
            self.conv3: nn.Module = nn.Identity()
        else:
            self.conv1 = ConvNormAct(in_channels, channels, 1)
            self.conv2 = ConvNormAct(channels, channels, 3, stride)
            self.conv3 = ConvNormAct(channels, out, 1, act=None)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out:
            self.shortcut = ConvNormAct(in_channels, out, 1, stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut and activate."""
        y = self.conv3(self.conv2(self.conv1(x)))
        return self.act(self.drop_path(y) + self.shortcut(x))


class ResNet(Classifier):
    """Stages of residual blocks; all but the first halve the resolution.

    Args:
        depths: blocks of each stage.
        expansion: 1 for basic blocks, 4 for the usual bottlenecks.
        width: multiplies all channels.
        widths: channels inside the blocks of each stage.
        large_images: begin with a 7x7 convolution and a pooling, else with a 3x3 convolution.
        stem_stride: stride of the first convolution, in pixels; None takes 2 for large images, 1 for small.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> ResNet((2, 2, 2, 2), num_classes=10).num_features
    512
    """

    def __init__(
        self,
        depths: Sequence[int],
        expansion: int = 1,
        width: float = 1.0,
        widths: Sequence[int] = WIDTHS,
        large_images: bool = True,
        stem_stride: int | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # Rounding would move published channels such as 60 or 516.
        inside = [w if width == 1.0 else make_divisible(w * width) for w in widths]
        channels, reduction = inside[0], stem_stride or (2 if large_images else 1)
        body: list[nn.Module] = [ConvNormAct(in_chans, channels, 7 if large_images else 3, reduction)]
        levels = [(channels, reduction)]
        if large_images:
            body.append(nn.MaxPool2d(3, 2, 1))
            reduction *= 2
            levels.append((channels, reduction))
        self.depths, self.first = tuple(depths), len(body)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for stage, (out, blocks) in enumerate(zip(inside, depths, strict=True)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                body.append(ResidualBlock(channels, out, stride, expansion, next(rates)))
                channels, reduction = expansion * out, reduction * stride
                levels.append((channels, reduction))
        super().__init__(nn.Sequential(*body), levels, channels, in_chans=in_chans, **kwargs)
        self.apply(_init_weights)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of torchvision, timm or mmdet to ours."""
        rules = [(r"conv1\.", "body.0.conv."), (r"bn1\.", "body.0.norm."), (r"fc\.", "classifier.")]
        position = self.first
        for stage, blocks in enumerate(self.depths, 1):
            for block in range(blocks):
                old, new = rf"layer{stage}\.{block}\.", f"body.{position}."
                rules += [
                    (rf"{old}conv(\d)\.", rf"{new}conv\1.conv."),
                    (rf"{old}bn(\d)\.", rf"{new}conv\1.norm."),
                    (rf"{old}downsample\.0\.", rf"{new}shortcut.conv."),
                    (rf"{old}downsample\.1\.", rf"{new}shortcut.norm."),
                ]
                position += 1
        return rename(state, rules)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
