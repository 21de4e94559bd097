"""GhostNetV2: half the channels from a cheap depthwise filter, repaired by attention along rows and columns.

A Ghost module computes half of its channels with a 1x1 convolution and the other half with a 3x3 depthwise
convolution of the first half, which costs about half of a full 1x1 convolution. Half of the channels then
never see their neighbours; the decoupled fully-connected (DFC) attention gates them with what lies along the
whole row and column, computed by two depthwise strip convolutions at half resolution. GhostNet, the base, is
the same network without gates.

Shapes:
    `(N, 3, 224, 224)` -> 16 x 1/2 -> 24 x 1/4 -> 40 x 1/8 -> 112 x 1/16 -> 160 x 1/32 -> 960 x 1/32 -> pooled
    1280 -> logits `(N, 1000)`. Every map under attention must be at least 2 x 2: 33 pixels is the smallest
    side (17 with `stem_stride=1`).

Differs:
    The shortcut is added out of place, so that tracing works; nothing else in the arithmetic. The paper's
    dropout of 0.2 is not the default: ask for `drop_rate=0.2`. Stochastic depth (`drop_path_rate`) is an
    addition. The extra `width` scales everything but the 1280 channels of the head, as the published widths
    do.

References: Tang et al., "GhostNetV2: Enhance Cheap Operation with Long-Range Attention", arXiv 2211.12905,
section 4; Han et al., "GhostNet: More Features from Cheap Operations", arXiv 1911.11907, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.layouts import rename
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.registry import register_model

STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    ((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)
"""Kernel, expanded channels, output channels, squeeze-excite and stride of each block, by published stage."""

HEAD = 1280
LAST = 17
"""Position of the last 1x1 convolution in the body: after the stem and 16 blocks."""


class GhostModule(nn.Module):
    """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`: half dense, half cheap.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; an odd number drops the last cheap channel.
        act: class of the activation after both halves, None for none.
    """

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module] | None = nn.ReLU) -> None:
        super().__init__()
        half = -(-out_channels // 2)
        self.out_channels = out_channels
        self.dense = ConvNormAct(in_channels, half, 1, act=act)
        self.cheap = ConvNormAct(half, half, 3, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the dense half, then the cheap half from it."""
        dense = self.dense(x)  # (N, half, H, W)
        return torch.cat((dense, self.cheap(dense)), 1)[:, : self.out_channels]


class DFCAttention(nn.Module):
    """Gates between 0 and 1 for `out_channels`, each aggregated along its row and its column.

    `(N, in_channels, H, W)` to `(N, out_channels, H // 2, W // 2)`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the gates.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        c = out_channels
        self.pool = nn.AvgPool2d(2)
        self.strips = nn.Sequential(
            nn.Conv2d(in_channels, c, 1, bias=False),
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, (1, 5), padding=(0, 2), groups=c, bias=False),  # along the row first
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, (5, 1), padding=(2, 0), groups=c, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give the gates at half resolution."""
        return self.strips(self.pool(x)).sigmoid()


class GatedGhostModule(nn.Module):
    """A Ghost module whose output is multiplied by DFC gates, repeated up to its resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.ghost = GhostModule(in_channels, out_channels)
        self.attention = DFCAttention(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        gate = F.interpolate(self.attention(x), size=x.shape[-2:], mode="nearest")
        return self.ghost(x) * gate


class GhostBottleneck(nn.Module):
    """Widen with a Ghost module, filter depthwise at stride 2, squeeze-excite, project, add the shortcut.

    Args:
        in_channels: channels of the input.
        hidden: channels in the middle.
        out_channels: channels of the output.
        kernel_size: side of the depthwise kernels, in pixels.
        stride: 1 or 2.
        squeeze: use squeeze-excite on the middle.
        attention: gate the middle with DFC attention.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        squeeze: bool,
        attention: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        widen = GatedGhostModule if attention else GhostModule
        self.widen = widen(in_channels, hidden)
        self.filter: nn.Module = nn.Identity()
        if stride > 1:
            self.filter = ConvNormAct(hidden, hidden, kernel_size, stride, groups=hidden, act=None)
        self.squeeze: nn.Module = nn.Identity()
        if squeeze:
            self.squeeze = SqueezeExcite(hidden, make_divisible(hidden / 4, 4))
        self.project = GhostModule(hidden, out_channels, act=None)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                ConvNormAct(in_channels, in_channels, kernel_size, stride, groups=in_channels, act=None),
                ConvNormAct(in_channels, out_channels, 1, act=None),
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        y = self.project(self.squeeze(self.filter(self.widen(x))))
        return self.drop_path(y) + self.shortcut(x)


class GhostNet(Classifier):
    """GhostNet (`attention=False`) and GhostNetV2 (`attention=True`).

    Args:
        width: multiplies every channel count but the head's 1280.
        attention: gate all blocks but the first two with DFC attention.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> GhostNet(width=0.5, num_classes=10).head_hidden_size
    1280
    """

    def __init__(
        self,
        width: float = 1.0,
        attention: bool = True,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        channels, reduction = make_divisible(16 * width, 4), stem_stride
        body: list[nn.Module] = [ConvNormAct(in_chans, channels, 3, stem_stride)]
        levels = [(channels, reduction)]
        blocks = [block for stage in STAGES for block in stage]
        rates = drop_path_rates(drop_path_rate, len(blocks))
        for index, (kernel, expanded, base, squeeze, stride) in enumerate(blocks):
            hidden, out = make_divisible(expanded * width, 4), make_divisible(base * width, 4)
            gated = attention and index > 1  # the first two blocks work at a resolution too high to gate
            body.append(GhostBottleneck(channels, hidden, out, kernel, stride, squeeze, gated, rates[index]))
            channels, reduction = out, reduction * stride
            levels.append((channels, reduction))
        last = make_divisible(960 * width, 4)
        body.append(ConvNormAct(channels, last, 1))
        head = nn.Sequential(nn.Conv2d(last, HEAD, 1), nn.ReLU())
        super().__init__(
            nn.Sequential(*body), levels, last, head=head, head_hidden_size=HEAD, in_chans=in_chans, **kwargs
        )

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the official repository or of timm (equal but for the last block) to ours."""
        return rename(state, _official_rules(self))


def _official_rules(model: GhostNet) -> list[tuple[str, str]]:
    rules = [
        (r"conv_stem\.", "body.0.conv."),
        (r"bn1\.", "body.0.norm."),
        (rf"blocks\.{len(STAGES)}\.0\.conv\.", f"body.{LAST}.conv."),
        (rf"blocks\.{len(STAGES)}\.0\.bn1\.", f"body.{LAST}.norm."),
        (r"conv_head\.", "head.0."),
    ]
    position = 0
    for stage, blocks in enumerate(STAGES):
        for block in range(len(blocks)):
            position += 1
            gated = isinstance(model.body[position].widen, GatedGhostModule)
            rules += _block_rules(rf"blocks\.{stage}\.{block}\.", f"body.{position}.", gated)
    return rules


def _block_rules(old: str, new: str, gated: bool) -> list[tuple[str, str]]:
    ghost = f"{new}widen.ghost." if gated else f"{new}widen."
    pairs = [
        (r"ghost1\.primary_conv\.0", f"{ghost}dense.conv"),
        (r"ghost1\.primary_conv\.1", f"{ghost}dense.norm"),
        (r"ghost1\.cheap_operation\.0", f"{ghost}cheap.conv"),
        (r"ghost1\.cheap_operation\.1", f"{ghost}cheap.norm"),
        (r"ghost1\.short_conv", f"{new}widen.attention.strips"),
        (r"conv_dw", f"{new}filter.conv"),
        (r"bn_dw", f"{new}filter.norm"),
        (r"se\.conv_reduce", f"{new}squeeze.reduce"),
        (r"se\.conv_expand", f"{new}squeeze.expand"),
        (r"ghost2\.primary_conv\.0", f"{new}project.dense.conv"),
        (r"ghost2\.primary_conv\.1", f"{new}project.dense.norm"),
        (r"ghost2\.cheap_operation\.0", f"{new}project.cheap.conv"),
        (r"ghost2\.cheap_operation\.1", f"{new}project.cheap.norm"),
        (r"shortcut\.0", f"{new}shortcut.0.conv"),
        (r"shortcut\.1", f"{new}shortcut.0.norm"),
        (r"shortcut\.2", f"{new}shortcut.1.conv"),
        (r"shortcut\.3", f"{new}shortcut.1.norm"),
    ]
    return [(rf"{old}{name}\.", f"{part}.") for name, part in pairs]


@register_model
def ghostnetv2_100(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNetV2 at width 1."""
    return GhostNet(width, **kwargs)


@register_model
def ghostnetv2_130(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNetV2 at width 1.3."""
    return GhostNet(1.3 * width, **kwargs)


@register_model
def ghostnetv2_160(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNetV2 at width 1.6."""
    return GhostNet(1.6 * width, **kwargs)


@register_model
def ghostnet_050(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNet, without attention, at width 0.5."""
    return GhostNet(0.5 * width, attention=False, **kwargs)


@register_model
def ghostnet_100(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNet, without attention, at width 1."""
    return GhostNet(width, attention=False, **kwargs)


@register_model
def ghostnet_130(width: float = 1.0, **kwargs: Any) -> GhostNet:
    """GhostNet, without attention, at width 1.3."""
    return GhostNet(1.3 * width, attention=False, **kwargs)
