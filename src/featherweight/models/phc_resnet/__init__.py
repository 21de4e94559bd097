"""PHC-ResNets and PHC-VGGs: the networks of 32-pixel images with 1/n of the weights in every convolution.

The hypercomplex layer (`featherweight.ops.phnn`) takes the place of every convolution, the first one and the
projections included; only the classifier stays real. Widths are chosen so that n divides them: 64 to 512 for
n = 2 and 4, the "large" 60 to 516 for n = 3 as well. Multiply-adds are those of the real network.

Shapes:
    `(N, 3, 32, 32)` -> zero channels in front up to a multiple of n -> w0 x 1 -> w1 x 1/2 -> w2 x 1/4 ->
    w3 x 1/8 -> pooled -> logits `(N, 10)`. The small ResNets have three stages; the VGGs (in `vgg`) halve the
    map five times.

Differs:
    Biases of the convolutions work here (see the layer) though a norm follows each of them; official weights
    set them to zero, as they were never added. Any image size and number of image channels: the official
    loaders put the zero channel into the data, here it belongs to the network. `width`, `stem_stride`,
    stochastic depth and `fuse()` are additions. For an n that does not divide the widths, they are rounded to
    multiples of n. The sound-event network of the paper is `sed.PHCSedNet`.

References: Grassucci, Zhang, Comminiello, arXiv 2110.04176; He et al., arXiv 1512.03385, for the
networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.drop_path import drop_path_rates
from featherweight.blocks.layouts import rename
from featherweight.models.phc_resnet.pieces import (
    EXPANSION,
    PHBlock,
    PHCClassifier,
    PHUnit,
    multiple,
    register,
)
from featherweight.models.phc_resnet.vgg import PHCVGG
from featherweight.ops.phnn import rename_official

__all__ = ["PHCVGG", "PHCResNet"]

WIDTHS = (64, 128, 256, 512)
LARGE_WIDTHS = (60, 120, 240, 516)
SMALL_WIDTHS = (16, 32, 64)
SMALL_LARGE_WIDTHS = (24, 72, 216)

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Blocks of each stage, by layers."""


class PHCResNet(PHCClassifier):
    """A ResNet for small images whose convolutions are hypercomplex.

    Args:
        n: components of the hypercomplex numbers: about 1/n of the real network's weights.
        depths: blocks of each stage.
        widths: channels of each stage, before the expansion.
        bottleneck: blocks of three convolutions with four times the channels behind them.
        width: multiplies the widths, rounded to multiples of n.
        stem_stride: stride of the first convolution, in pixels.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: n is below 1.

    >>> sum(p.numel() for p in PHCResNet(4, num_classes=10).parameters())
    2810762
    """

    def __init__(
        self,
        n: int = 4,
        depths: Sequence[int] = DEPTHS[18],
        widths: Sequence[int] = WIDTHS,
        bottleneck: bool = False,
        width: float = 1.0,
        stem_stride: int = 1,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        widths = [multiple(channels * width, n) for channels in widths]
        channels, reduction = widths[0], stem_stride
        body: list[nn.Module] = [PHUnit(n, in_chans, channels, 3, stem_stride)]
        levels = [(channels, reduction)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for stage, (middle, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                body.append(PHBlock(n, channels, middle, stride, bottleneck, next(rates)))
                channels = middle * EXPANSION if bottleneck else middle
                reduction *= stride
                levels.append((channels, reduction))
        defaults = {"input_size": (3, 32, 32), "interpolation": "bilinear", **kwargs}
        super().__init__(nn.Sequential(*body), levels, channels, in_chans=in_chans, **defaults)
        self.depths = tuple(depths)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys to ours and set the biases that were never added to zero."""
        rules = [
            (r"conv1\.", "body.0.conv."),
            (r"bn1\.", "body.0.norm."),
            (r"linear\.", "classifier."),
        ]
        position = 0
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                position += 1
                old, new = rf"layer{stage + 1}\.{index}\.", f"body.{position}."
                for unit in range(3):
                    rules += [
                        (rf"{old}conv{unit + 1}\.", f"{new}units.{unit}.conv."),
                        (rf"{old}bn{unit + 1}\.", f"{new}units.{unit}.norm."),
                    ]
                rules += [
                    (rf"{old}shortcut\.0\.", f"{new}shortcut.conv."),
                    (rf"{old}shortcut\.1\.", f"{new}shortcut.norm."),
                ]
        return rename(rename_official(state), rules)


BASIC, BOTTLENECK = False, True
SETTINGS = {
    "phcresnet18": (DEPTHS[18], WIDTHS, BASIC, (1, 2, 4)),
    "phcresnet34": (DEPTHS[34], WIDTHS, BASIC, (4,)),
    "phcresnet50": (DEPTHS[50], WIDTHS, BOTTLENECK, (1, 2, 4)),
    "phcresnet101": (DEPTHS[101], WIDTHS, BOTTLENECK, (4,)),
    "phcresnet152": (DEPTHS[152], WIDTHS, BOTTLENECK, (4,)),
    "phcresnet18large": (DEPTHS[18], LARGE_WIDTHS, BASIC, (1, 2, 3, 4)),
    "phcresnet50large": (DEPTHS[50], LARGE_WIDTHS, BOTTLENECK, (1, 2, 3, 4)),
    "phcresnet152large": (DEPTHS[152], LARGE_WIDTHS, BOTTLENECK, (1, 2, 3, 4)),
    "phcresnet20": ((3, 3, 3), SMALL_WIDTHS, BASIC, (2, 4)),
    "phcresnet32": ((5, 5, 5), SMALL_WIDTHS, BASIC, (4,)),
    "phcresnet44": ((7, 7, 7), SMALL_WIDTHS, BASIC, (4,)),
    "phcresnet56": ((9, 9, 9), SMALL_WIDTHS, BASIC, (4,)),
    "phcresnet110": ((18, 18, 18), SMALL_WIDTHS, BASIC, (2, 4)),
    "phcresnet20large": ((3, 3, 3), SMALL_LARGE_WIDTHS, BASIC, (3,)),
    "phcresnet110large": ((18, 18, 18), SMALL_LARGE_WIDTHS, BASIC, (3,)),
}
"""Blocks of each stage, widths, kind of block and the published n of each network; its name ends in `_n`."""

for _name, (_depths, _widths, _bottleneck, _ns) in SETTINGS.items():
    for _n in _ns:
        register(
            f"{_name}_n{_n}",
            PHCResNet,
            f"{_name} over {_n} components.",
            n=_n,
            depths=_depths,
            widths=_widths,
            bottleneck=_bottleneck,
        )
