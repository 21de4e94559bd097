"""SpaRTAN: two depthwise paths that see differently far, and a channel mixer that rotates channel pairs.

Small networks tend to keep what is plain. Each block therefore works on half of its channels twice, once near
(3x3) and once far (two dilated 3x3, together 9x9), after strengthening what deviates from the map's mean.
The usual wide MLP is replaced by a gated product of two projections, to which the product at the pixel's
strongest channel is added; neighbouring channels are then rotated and scaled as complex numbers. It is cheap
because the widening is only 2 to 4 and every large kernel in the deep stages is depthwise or in small groups.

Shapes:
    `(N, 3, 256, 256)` -> stem 32 x 1/4 -> 64 x 1/8 -> 128 x 1/16 -> 256 x 1/32 -> logits `(N, 1000)`. Any
    size from 29 pixels on (15 with `stem_stride=1`); the steps between stages drop an odd last row or column.

Differs:
    The product of complex numbers is written in real numbers and the dominant product is gathered once, after
    multiplying, so that the network exports; the values are the same. Stochastic depth is off unless
    `drop_path_rate` asks for it (the paper: 0.1). `fuse`, `width` and `stem_stride` (of the first of the two
    stem convolutions) are additions. `gamma` is one-dimensional, which keeps it out of weight decay as the
    official recipe does by its name.

Reference: Pay et al., "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual
Recognition", arXiv 2507.10999; sizes from the released configuration.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath
from featherweight.blocks.fold import check_eval, fold_after, scale_output
from featherweight.blocks.layouts import rename
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.errors import UsageError
from featherweight.registry import register_model

NORM = partial(nn.BatchNorm2d, eps=1e-6)
SMALL = 1e-5
"""First value of the strengthening and of the scales of both branches: blocks start as the identity."""

OFFICIAL_BLOCK = (
    (r"smixer\.gamma$", "spatial.gamma"),
    (r"smixer\.proj_in\.", "spatial.squeeze."),
    (r"smixer\.h_conv\.", "spatial.near."),
    (r"smixer\.l_conv\.(\d)\.conv\.", r"spatial.far.\1."),
    (r"smixer\.l_conv\.1\.norm\.", "spatial.far.2."),
    (r"smixer\.h_attn\.squeeze\.", "spatial.near_gate.reduce."),
    (r"smixer\.h_attn\.expand\.", "spatial.near_gate.expand."),
    (r"smixer\.l_attn\.squeeze\.", "spatial.far_gate.reduce."),
    (r"smixer\.l_attn\.expand\.", "spatial.far_gate.expand."),
    (r"smixer\.proj_out\.", "spatial.project."),
    (r"cmixer\.theta\.", "channel.theta."),
    (r"cmixer\.proj\.", "channel.amplitude."),
    (r"cmixer\.complex$", "channel.rotate.weight"),
    (r"cmixer\.conv\.", "channel.filter."),
    (r"cmixer\.attn\.squeeze\.", "channel.gate.reduce."),
    (r"cmixer\.attn\.expand\.", "channel.gate.expand."),
    (r"cmixer\.proj_out\.", "channel.project."),
    (r"norm_(\d)\.", r"norm\1."),
    (r"scale_(\d)$", r"scale\1.weight"),
)
"""Names inside a block: the official ones and ours."""


class BranchScale(nn.Module):
    """Multiply each channel of a branch by a learned number: `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), SMALL))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        return self.weight * x


class PairRotation(nn.Module):
    """Multiply channels 2j and 2j + 1, read as real and imaginary part, by a learned complex number.

    `(N, C, H, W)` to the same shape. Under autocast the product is computed in the weights' float32.

    Args:
        channels: channels of the input, an even number.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels // 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate and scale each pair."""
        real, imaginary = self.weight.unbind(1)
        straight = torch.stack((real, real), 1).reshape(-1, 1, 1)  # (C, 1, 1)
        across = torch.stack((-imaginary, imaginary), 1).reshape(-1, 1, 1)
        swapped = x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)  # (N, C, H, W)
        return (x * straight + swapped * across).to(x.dtype)


class SpatialMixer(nn.Module):
    """Strengthen what deviates from the mean, filter near and far on half of the channels, join.

    `(N, channels, H, W)` to the same shape.

    Args:
        channels: channels of input and output, a multiple of 8.
        depthwise: filter each channel alone; otherwise the 3x3 convolutions are dense.
    """

    def __init__(self, channels: int, depthwise: bool) -> None:
        super().__init__()
        half = channels // 2
        groups = half if depthwise else 1
        wide = partial(nn.Conv2d, half, half, 3, padding=2, dilation=2, groups=groups, bias=False)
        self.squeeze = nn.Conv2d(channels, half, 1)
        self.gamma = nn.Parameter(torch.full((half,), SMALL))
        self.near = ConvNormAct(half, half, 3, groups=groups, act=nn.GELU, norm=NORM)
        self.far = nn.Sequential(wide(), wide(), NORM(half), nn.GELU())
        self.near_gate = SqueezeExcite(half, half // 4, gate=nn.Sigmoid)
        self.far_gate = SqueezeExcite(half, half // 4, gate=nn.Sigmoid)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix over space."""
        x = self.squeeze(x)  # (N, channels / 2, H, W)
        x = x + self.gamma[:, None, None] * (x - F.adaptive_avg_pool2d(x, 1))
        both = torch.cat((self.near_gate(self.near(x)), self.far_gate(self.far(x))), 1)
        return self.project(both)  # (N, channels, H, W)


class ChannelMixer(nn.Module):
    """Multiply two projections, add the product at the strongest channel, rotate pairs, filter, project.

    `(N, channels, H, W)` to the same shape.

    Args:
        channels: channels of input and output.
        expansion: the middle has `channels * expansion` channels.
        depthwise: filter each channel alone; otherwise in groups of `expansion` channels.
    """

    def __init__(self, channels: int, expansion: int, depthwise: bool) -> None:
        super().__init__()
        hidden = channels * expansion
        self.theta = nn.Conv2d(channels, hidden, 1)
        self.amplitude = nn.Conv2d(channels, hidden, 1)
        self.rotate: nn.Module = PairRotation(hidden)
        groups = hidden if depthwise else channels
        self.filter = ConvNormAct(hidden, hidden, 3, groups=groups, act=nn.GELU, norm=NORM)
        self.gate = SqueezeExcite(hidden, channels // 4, gate=nn.Sigmoid)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix over channels."""
        strongest = x.argmax(1, keepdim=True)  # (N, 1, H, W), below `channels`
        product = self.amplitude(x) * F.gelu(self.theta(x))  # (N, hidden, H, W)
        product = product + product.gather(1, strongest)
        return self.project(self.gate(self.filter(self.rotate(product))))  # (N, channels, H, W)

    def fuse_rotation(self) -> None:
        """Move the rotation into the filter after it, where no group of the filter divides a pair."""
        conv = self.filter.conv
        outputs, inputs = conv.weight.shape[:2]
        if inputs % 2 or isinstance(self.rotate, nn.Identity):
            return
        # Group g reads the pairs g * inputs / 2 and following, for each of its outputs.
        pairs = self.rotate.weight.reshape(conv.groups, 1, inputs // 2, 2)
        pairs = pairs.expand(-1, outputs // conv.groups, -1, -1).reshape(outputs, inputs // 2, 2, 1, 1)
        real, imaginary = pairs.unbind(2)
        first, second = conv.weight[:, 0::2], conv.weight[:, 1::2]
        turned = torch.stack((first * real + second * imaginary, second * real - first * imaginary), 2)
        conv.weight.data = turned.flatten(1, 2)
        self.rotate = nn.Identity()


class SpartanBlock(nn.Module):
    """Spatial mixer, then channel mixer, each on the normalised input with a scaled shortcut.

    `(N, channels, H, W)` to the same shape. The normalisation takes the statistics of all channels and pixels
    of an image together.

    Args:
        channels: channels of input and output, a multiple of 8.
        expansion: widening of the channel mixer.
        early: dense spatial and depthwise channel mixing; otherwise depthwise and grouped.
        drop_path: probability of dropping each branch during training.
    """

    def __init__(self, channels: int, expansion: int, early: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, channels, eps=1e-6)
        self.spatial = SpatialMixer(channels, depthwise=not early)
        self.scale1: nn.Module = BranchScale(channels)
        self.norm2 = nn.GroupNorm(1, channels, eps=1e-6)
        self.channel = ChannelMixer(channels, expansion, depthwise=early)
        self.scale2: nn.Module = BranchScale(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Mix over space, then over channels."""
        x = x + self.drop_path(self.scale1(self.spatial(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.channel(self.norm2(x))))

    def fuse_scales(self) -> None:
        """Move the scales of both branches into the projections before them."""
        for name, mixer in (("scale1", self.spatial), ("scale2", self.channel)):
            scale = getattr(self, name)
            if isinstance(scale, BranchScale):
                scale_output(mixer.project, scale.weight.flatten())
                setattr(self, name, nn.Identity())


class SpaRTAN(Classifier):
    """A SpaRTAN from the lists of its stages.

    Args:
        depths: blocks of each stage; the first half of the stages is early (see `SpartanBlock`).
        channels: channels of each stage.
        expansions: widening of each stage's channel mixers.
        width: multiplies all channels, rounded to multiples of 8.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth that the block after the deepest would have.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: the lists differ in length, or channels are not multiples of 8.

    >>> SpaRTAN((1, 1), (16, 32), (4, 2), num_classes=10).num_features
    32
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 12, 2),
        channels: Sequence[int] = (32, 64, 128, 256),
        expansions: Sequence[int] = (4, 4, 2, 2),
        width: float = 1.0,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if len({len(depths), len(channels), len(expansions)}) > 1 or any(c % 8 for c in channels):
            raise UsageError(
                f"Stages of depths {tuple(depths)}, channels {tuple(channels)} and expansions "
                f"{tuple(expansions)}. Expected lists of equal length, and channels that are multiples of 8."
            )
        widths = [make_divisible(c * width) for c in channels]
        stem = partial(ConvNormAct, act=nn.GELU, norm=NORM)
        body: list[nn.Module] = [
            stem(in_chans, widths[0] // 2, 3, stem_stride),
            stem(widths[0] // 2, widths[0], 3, 2),
        ]
        reduction = 2 * stem_stride
        levels = [(widths[0] // 2, stem_stride), (widths[0], reduction)]
        done, total = 0, sum(depths)
        for stage, (depth, out, expansion) in enumerate(zip(depths, widths, expansions, strict=True)):
            if stage:
                body.append(_downsample(widths[stage - 1], out))
                reduction *= 2
                levels.append((out, reduction))
            for _ in range(depth):
                early = stage < len(depths) // 2
                body.append(SpartanBlock(out, expansion, early, drop_path_rate * done / total))
                levels.append((out, reduction))
                done += 1
        super().__init__(
            nn.Sequential(*body),
            levels,
            widths[-1],
            in_chans=in_chans,
            **{"input_size": (3, 256, 256), **kwargs},
        )
        self.default_cfg["crop_pct"] = 1.0
        self.apply(_init_weights)

    @torch.no_grad()
    def fuse(self) -> SpaRTAN:
        """Fold batch norms, branch scales and, where pairs stay together, rotations into convolutions.

        In place, for inference; returns the network itself.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in self.modules():
            if isinstance(module, SpartanBlock):
                module.fuse_scales()
                module.channel.fuse_rotation()
            for (_, conv), (name, norm) in itertools.pairwise(list(module.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    fold_after(conv, norm)
                    setattr(module, name, nn.Identity())
        return self

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the official class to ours; vectors lose their singleton dimensions."""
        renamed = {}
        for key, value in rename(state, [(r"conv\.", "body."), (r"linear\.", "classifier.")]).items():
            if key.startswith("layers."):
                _, index, inside = key.split(".", 2)
                ((inside, value),) = rename({inside: value}, OFFICIAL_BLOCK).items()
                key = f"body.{int(index) + 2}.{inside}"  # the two stem convolutions come first
            if key.endswith("spatial.gamma"):
                value = value.flatten()
            elif key.endswith("rotate.weight"):
                value = value.reshape(-1, 2)
            renamed[key] = value
        return renamed


def _downsample(channels: int, out: int) -> nn.Module:
    """Halve the resolution with 2x2 patches that do not overlap."""
    conv = nn.Conv2d(channels, out, 2, 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=NORM(out), act=nn.SiLU()))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@register_model
def spartan_t(**kwargs: Any) -> SpaRTAN:
    """The released configuration: 3.8 M parameters."""
    return SpaRTAN(**kwargs)
