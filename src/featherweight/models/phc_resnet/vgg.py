"""PHC-VGGs: VGG with batch norm whose convolutions and hidden linear layers are hypercomplex."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.layouts import rename
from featherweight.models.phc_resnet.pieces import PHCClassifier, PHUnit, multiple, register
from featherweight.ops.phnn import PHLinear, rename_official

WIDTHS, LARGE_WIDTHS = (64, 128, 256, 512, 512), (24, 72, 216, 648, 648)
HIDDEN, LARGE_HIDDEN = 512, 516
DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage; a 2x2 maximum follows each stage."""


class PHHead(nn.Module):
    """Two hypercomplex linear layers over the channels of a map, with dropout before each.

    `(N, channels, H, W)` to `(N, hidden, H, W)`.

    Args:
        n: components of the hypercomplex numbers.
        channels: channels of the map.
        hidden: channels of the answer.
    """

    def __init__(self, n: int, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(),
            PHLinear(channels, hidden, n=n),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            PHLinear(hidden, hidden, n=n),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers at every position."""
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)


class PHCVGG(PHCClassifier):
    """A VGG for small images whose convolutions and hidden linear layers are hypercomplex.

    Args:
        n: components of the hypercomplex numbers: about 1/n of the real network's weights.
        depths: convolutions of each stage.
        widths: channels of each stage.
        hidden: channels of the two hidden linear layers.
        width: multiplies widths and hidden channels, rounded to multiples of n.
        stem_stride: stride of the first convolution, in pixels.
        in_chans: channels of the image.
        drop_path_rate: has no effect; there is no residual.
        **kwargs: see `Classifier`.

    >>> sum(p.numel() for p in PHCVGG(4, num_classes=10).parameters())
    3828618
    """

    def __init__(
        self,
        n: int = 4,
        depths: Sequence[int] = DEPTHS[16],
        widths: Sequence[int] = WIDTHS,
        hidden: int = HIDDEN,
        width: float = 1.0,
        stem_stride: int = 1,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        widths, hidden = [multiple(w * width, n) for w in widths], multiple(hidden * width, n)
        body: list[nn.Module] = []
        levels: list[tuple[int, int]] = []
        before, reduction = in_chans, stem_stride
        for channels, depth in zip(widths, depths, strict=True):
            for _ in range(depth):
                body.append(PHUnit(n, before, channels, 3, 1 if body else stem_stride))
                levels.append((channels, reduction))
                before = channels
            body.append(nn.MaxPool2d(2))
            reduction *= 2
            levels.append((channels, reduction))
        defaults = {"input_size": (3, 32, 32), "interpolation": "bilinear", **kwargs}
        head = PHHead(n, before, hidden)
        super().__init__(
            nn.Sequential(*body),
            levels,
            before,
            head=head,
            head_hidden_size=hidden,
            in_chans=in_chans,
            **defaults,
        )

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys to ours and set the biases that were never added to zero."""
        rules, position = [], 0
        for index, module in enumerate(self.body):
            if isinstance(module, PHUnit):
                rules += [
                    (rf"features\.{position}\.", f"body.{index}.conv."),
                    (rf"features\.{position + 1}\.", f"body.{index}.norm."),
                ]
            position += 3 if isinstance(module, PHUnit) else 1
        rules += [
            (r"classifier\.1\.", "head.layers.1."),
            (r"classifier\.4\.", "head.layers.4."),
            (r"classifier\.6\.", "classifier."),
        ]
        return rename(rename_official(state), rules)


SETTINGS = {
    "phcvgg11_bn": (DEPTHS[11], WIDTHS, HIDDEN, (1, 2, 4)),
    "phcvgg16_bn": (DEPTHS[16], WIDTHS, HIDDEN, (1, 2, 4)),
    "phcvgg19large_bn": (DEPTHS[19], LARGE_WIDTHS, LARGE_HIDDEN, (1, 2, 3, 4)),
}
"""Convolutions of each stage, widths, hidden channels and the published n of each network."""

for _name, (_depths, _widths, _hidden, _ns) in SETTINGS.items():
    for _n in _ns:
        register(
            f"{_name}_n{_n}",
            PHCVGG,
            f"{_name} over {_n} components.",
            n=_n,
            depths=_depths,
            widths=_widths,
            hidden=_hidden,
        )
