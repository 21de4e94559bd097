"""MobileNetV2: inverted residuals with linear bottlenecks.

A block widens a thin tensor with a 1x1 convolution, filters it depthwise, and projects back to a thin tensor
without a non-linearity; the skip joins the thin ends. It is cheap because the only dense products act on thin
tensors, because the 3x3 filter in the wide middle is depthwise, and because only thin tensors have to be kept
in memory for the skip.

Shapes:
    `(N, 3, 224, 224)` -> stem 1/2 -> 16 x 1/2 -> 24 x 1/4 -> 32 x 1/8 -> 96 x 1/16 -> 320 x 1/32 -> 1280 x
    1/32 -> logits `(N, 1000)`. Any side works; `stem_stride=1` doubles every resolution, for images of 32 to
    64 pixels.

Differs:
    Padding is symmetric (torchvision, timm), not TensorFlow's SAME; batch norm's epsilon is 1e-5, not 1e-3.
    The classifier has 1000 outputs, without TensorFlow's background class. Stochastic depth
    (`drop_path_rate`) is an addition. `strides` of the seven stages are open, so that small images may keep
    their resolution.

Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381, table
2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import drop_path_rates
from featherweight.blocks.inverted_residual import InvertedResidual
from featherweight.blocks.layouts import rename
from featherweight.registry import register_model

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, output channels at width 1, and number of blocks of each stage."""

STRIDES = (1, 2, 2, 2, 1, 2, 1)
LAST = 18
"""Position of the last 1x1 convolution in the body: after the stem and 17 blocks."""


class MobileNetV2(Classifier):
    """The classifier of table 2.

    Args:
        width: multiplies every channel count; the last convolution never goes below 1280.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        strides: stride of the first block of each of the seven stages.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> MobileNetV2(width=0.35, num_classes=10).num_features
    1280
    """

    def __init__(
        self,
        width: float = 1.0,
        stem_stride: int = 2,
        strides: Sequence[int] = STRIDES,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        channels, reduction = make_divisible(32 * width), stem_stride
        body: list[nn.Module] = [ConvNormAct(in_chans, channels, 3, stem_stride, act=nn.ReLU6)]
        levels = [(channels, reduction)]
        rates = iter(drop_path_rates(drop_path_rate, LAST - 1))
        for (expansion, base, blocks), first in zip(STAGES, strides, strict=True):
            for stride in (first, *[1] * (blocks - 1)):
                out = make_divisible(base * width)
                body.append(InvertedResidual(channels, out, stride, expansion, drop_path=next(rates)))
                channels, reduction = out, reduction * stride
                levels.append((channels, reduction))
        last = make_divisible(1280 * max(1.0, width))
        body.append(ConvNormAct(channels, last, 1, act=nn.ReLU6))
        super().__init__(nn.Sequential(*body), levels, last, in_chans=in_chans, **kwargs)
        self.apply(_init_weights)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename torchvision's or timm's keys to ours."""
        return rename(state, TORCHVISION_RULES if "features.0.0.weight" in state else _timm_rules())


TORCHVISION_RULES = [
    (rf"features\.(0|{LAST})\.0\.", r"body.\1.conv."),
    (rf"features\.(0|{LAST})\.1\.", r"body.\1.norm."),
    (r"features\.1\.conv\.0\.0\.", r"body.1.depthwise.conv."),
    (r"features\.1\.conv\.0\.1\.", r"body.1.depthwise.norm."),
    (r"features\.1\.conv\.1\.", r"body.1.project.conv."),
    (r"features\.1\.conv\.2\.", r"body.1.project.norm."),
    (r"features\.(\d+)\.conv\.0\.0\.", r"body.\1.expand.conv."),
    (r"features\.(\d+)\.conv\.0\.1\.", r"body.\1.expand.norm."),
    (r"features\.(\d+)\.conv\.1\.0\.", r"body.\1.depthwise.conv."),
    (r"features\.(\d+)\.conv\.1\.1\.", r"body.\1.depthwise.norm."),
    (r"features\.(\d+)\.conv\.2\.", r"body.\1.project.conv."),
    (r"features\.(\d+)\.conv\.3\.", r"body.\1.project.norm."),
    (r"classifier\.1\.", r"classifier."),
]


def _timm_rules() -> list[tuple[str, str]]:
    rules = [
        (r"conv_stem\.", "body.0.conv."),
        (r"bn1\.", "body.0.norm."),
        (r"conv_head\.", f"body.{LAST}.conv."),
        (r"bn2\.", f"body.{LAST}.norm."),
    ]
    first_names = ("conv_dw", "bn1", "conv_pw", "bn2")
    names = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
    parts = ("expand.conv", "expand.norm", "depthwise.conv", "depthwise.norm", "project.conv", "project.norm")
    position = 0
    for stage, (expansion, _, blocks) in enumerate(STAGES):
        for block in range(blocks):
            position += 1
            pairs = (
                zip(first_names, parts[2:], strict=True) if expansion == 1 else zip(names, parts, strict=True)
            )
            rules += [
                (rf"blocks\.{stage}\.{block}\.{name}\.", f"body.{position}.{part}.") for name, part in pairs
            ]
    return rules


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


@register_model
def mobilenetv2_035(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 0.35."""
    return MobileNetV2(0.35 * width, **kwargs)


@register_model
def mobilenetv2_050(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 0.5."""
    return MobileNetV2(0.5 * width, **kwargs)


@register_model
def mobilenetv2_075(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 0.75."""
    return MobileNetV2(0.75 * width, **kwargs)


@register_model
def mobilenetv2_100(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 1."""
    return MobileNetV2(width, **kwargs)


@register_model
def mobilenetv2_130(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 1.3."""
    return MobileNetV2(1.3 * width, **kwargs)


@register_model
def mobilenetv2_140(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 at width 1.4."""
    return MobileNetV2(1.4 * width, **kwargs)
