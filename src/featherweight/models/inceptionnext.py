"""InceptionNeXt: a large depthwise kernel split into identity, a small square and two thin bands.

A 7x7 depthwise convolution needs few multiply-adds and much memory traffic, which is what a training step
waits for. Most channels gain nothing from being filtered at every block: here they pass untouched, and three
small groups get a 3x3, a 1x11 and an 11x1 kernel, whose bands together see further than 7x7. The rest is
ConvNeXt with batch norms, which fold away: one mixer, two pointwise layers, one skip.

Shapes:
    `(N, 3, 224, 224)` -> C x 1/4 -> 2C x 1/8 -> 4C x 1/16 -> 8C x 1/32 -> pooled 8C -> 24C -> logits
    `(N, 1000)`, with C from 40 (atto) to 128 (base). Any size from 32 pixels on (16 with `stem_stride=1`); an
    odd last row or column is dropped at each step between stages.

Differs:
    `fuse`, `width` (rounding to multiples of 8) and `stem_stride` are additions: the stem cuts the image into
    patches of side `2 * stem_stride`, officially 4. The head also works on maps, for `global_pool=""`. A
    classifier from `reset_classifier` starts as PyTorch's linear layers do. Stochastic depth is off unless
    `drop_path_rate` asks for it (the paper: 0.1 for tiny, 0.3 for small, 0.4 for base).

Reference: Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", CVPR 2024, arXiv 2303.16900, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, fold_after, fold_before, scale_output
from featherweight.blocks.layouts import rename
from featherweight.registry import register_model

ATTO = (40, 80, 160, 320), (2, 2, 6, 2)
TINY = (96, 192, 384, 768), (3, 3, 9, 3)
SMALL = (96, 192, 384, 768), (3, 3, 27, 3)
BASE = (128, 256, 512, 1024), (3, 3, 27, 3)
"""Channels and number of blocks of the four stages."""


class InceptionDepthwise(nn.Module):
    """Filter three groups of channels, each with its own kernel, and pass the others: same shape.

    The order is identity, square, along rows, along columns. A group takes `int(channels * ratio)` channels.

    Args:
        channels: channels of the input.
        ratio: part of the channels in each of the three groups.
        band: length of the thin kernels, in pixels, odd.
    """

    def __init__(self, channels: int, ratio: float = 1 / 8, band: int = 11) -> None:
        super().__init__()
        group = int(channels * ratio)
        self.sizes = (channels - 3 * group, group, group, group)
        self.square = _depthwise(group, 3, 3)
        self.along_rows = _depthwise(group, 1, band)
        self.along_columns = _depthwise(group, band, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        rest, *groups = x.split(self.sizes, 1)
        # Slices have gaps between images or pixels; packed copies convolve up to twice as fast on a CPU.
        square, rows, columns = (group.clone() for group in groups)
        return torch.cat((rest, self.square(square), self.along_rows(rows), self.along_columns(columns)), 1)


class MetaNeXtBlock(nn.Module):
    """Mix positions, normalise, widen, project; plus the input. `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
        mlp_ratio: how many times wider the layer between the pointwise convolutions is.
        ratio: see `InceptionDepthwise`.
        band: see `InceptionDepthwise`.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self, channels: int, mlp_ratio: int, ratio: float = 1 / 8, band: int = 11, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.mixer: nn.Module = InceptionDepthwise(channels, ratio, band)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, mlp_ratio * channels, 1)
        self.act = nn.GELU()
        self.project = nn.Conv2d(mlp_ratio * channels, channels, 1)
        self.gain: nn.Parameter | None = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the input."""
        y = self.norm(self.mixer(x))
        y = self.project(self.act(self.expand(y)))  # (N, mlp_ratio * C, H, W) in between
        if self.gain is not None:
            y = self.gain[:, None, None] * y
        return x + self.drop_path(y)

    def merge(self) -> None:
        """Put the norm into the first pointwise convolution and the gain into the second, in place; once."""
        if self.gain is not None:
            fold_before(self.norm, self.expand)
            scale_output(self.project, self.gain)
            self.norm, self.gain = nn.Identity(), None


class Stem(nn.Module):
    """Cut the image into patches: `(N, in_chans, H, W)` to `(N, channels, H // patch, W // patch)`."""

    def __init__(self, in_chans: int, channels: int, patch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, channels, patch, patch)
        self.norm: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Project each patch, normalise."""
        return self.norm(self.conv(x))

    def merge(self) -> None:
        """Put the norm into the convolution, in place; once."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_after(self.conv, self.norm)
            self.norm = nn.Identity()


class Downsample(nn.Module):
    """Halve the resolution: `(N, in_channels, H, W)` to `(N, out_channels, H // 2, W // 2)`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, convolve with stride 2."""
        return self.conv(self.norm(x))

    def merge(self) -> None:
        """Put the norm into the convolution, which has no padding to spoil that, in place; once."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_before(self.norm, self.conv)
            self.norm = nn.Identity()


class Head(nn.Module):
    """Widen pooled features threefold and normalise them: `(N, C, H, W)` to `(N, 3C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Linear(channels, 3 * channels)
        self.act = nn.GELU()
        self.scale = nn.LayerNorm(3 * channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Work on the channels of each place."""
        x = self.scale(self.act(self.widen(x.permute(0, 2, 3, 1))))  # (N, H, W, 3C)
        return x.permute(0, 3, 1, 2)


class InceptionNeXt(Classifier):
    """InceptionNeXt from the channels and the number of blocks of its stages.

    Args:
        channels: of each stage, at width 1.
        depths: blocks of each stage; the last stage widens threefold, the others fourfold.
        ratio: part of the channels in each filtered group.
        band: length of the thin kernels, in pixels, odd.
        width: multiplies every channel count.
        stem_stride: half the side of the stem's patches, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        crop_pct: part of the image that the published evaluation keeps.
        **kwargs: see `Classifier`.

    >>> InceptionNeXt((16, 32), (1, 2), num_classes=10).head_hidden_size
    96
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        ratio: float = 1 / 8,
        band: int = 11,
        width: float = 1.0,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        crop_pct: float = 0.875,
        **kwargs: Any,
    ) -> None:
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        reduction = 2 * stem_stride
        body: list[nn.Module] = []
        levels: list[tuple[int, int]] = []
        before = in_chans
        for stage, (base, depth) in enumerate(zip(channels, depths, strict=True)):
            out = make_divisible(base * width)
            if stage:
                body.append(Downsample(before, out))
                reduction *= 2
            else:
                body.append(Stem(in_chans, out, reduction))
            mlp_ratio = 3 if stage == len(depths) - 1 else 4
            body += [MetaNeXtBlock(out, mlp_ratio, ratio, band, next(rates)) for _ in range(depth)]
            levels += [(out, reduction)] * (1 + depth)
            before = out
        super().__init__(
            nn.Sequential(*body),
            levels,
            before,
            head=Head(before),
            head_hidden_size=3 * before,
            in_chans=in_chans,
            **kwargs,
        )
        self.default_cfg["crop_pct"] = crop_pct
        self.apply(_init_weights)

    def fuse(self) -> Self:
        """Fold every batch norm and gain into the convolution beside it, in place.

        Raises:
            UsageError: the network is in training mode, whose batch statistics cannot be folded.
        """
        check_eval(self)
        for module in self.body:
            module.merge()
        return self

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys, which are timm's as well, to ours."""
        return rename(state, _official_rules(self))


def _official_rules(model: InceptionNeXt) -> list[tuple[str, str]]:
    rules = [
        (r"head\.fc1\.", "head.widen."),
        (r"head\.norm\.", "head.scale."),
        (r"head\.fc2\.", "classifier."),
        (r"stem\.0\.", "body.0.conv."),
        (r"stem\.1\.", "body.0.norm."),
    ]
    parts = (
        (r"token_mixer\.dwconv_hw\.", "mixer.square."),
        (r"token_mixer\.dwconv_w\.", "mixer.along_rows."),
        (r"token_mixer\.dwconv_h\.", "mixer.along_columns."),
        (r"norm\.", "norm."),
        (r"mlp\.fc1\.", "expand."),
        (r"mlp\.fc2\.", "project."),
        ("gamma$", "gain"),
    )
    stage, block = 0, 0
    for index, module in enumerate(model.body):
        new = f"body.{index}."
        if isinstance(module, Downsample):
            stage, block = stage + 1, 0
            rules.append((rf"stages\.{stage}\.downsample\.0\.", f"{new}norm."))
            rules.append((rf"stages\.{stage}\.downsample\.1\.", f"{new}conv."))
        elif isinstance(module, MetaNeXtBlock):
            old = rf"stages\.{stage}\.blocks\.{block}\."
            rules += [(old + pattern, new + name) for pattern, name in parts]
            block += 1
    return rules


def _depthwise(channels: int, height: int, width: int) -> nn.Conv2d:
    padding = (height // 2, width // 2)
    return nn.Conv2d(channels, channels, (height, width), padding=padding, groups=channels)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@register_model
def inceptionnext_atto(**kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-A: 40 channels first, 12 blocks, more channels filtered with shorter bands."""
    return InceptionNeXt(*ATTO, **{"ratio": 1 / 4, "band": 9, **kwargs})


@register_model
def inceptionnext_tiny(**kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-T: 96 channels first, 18 blocks."""
    return InceptionNeXt(*TINY, **kwargs)


@register_model
def inceptionnext_small(**kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-S: 96 channels first, 36 blocks."""
    return InceptionNeXt(*SMALL, **kwargs)


@register_model
def inceptionnext_base(**kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-B: 128 channels first, 36 blocks."""
    return InceptionNeXt(*BASE, **kwargs)


@register_model
def inceptionnext_base_384(**kwargs: Any) -> InceptionNeXt:
    """InceptionNeXt-B, fine-tuned at 384 pixels."""
    return inceptionnext_base(**{"input_size": (3, 384, 384), "crop_pct": 1.0, **kwargs})
