"""OSNet: every block looks at four scales at once, and one shared gate decides which of them matter.

A bottleneck feeds four streams of one to four light 3x3 convolutions, which see 3, 5, 7 and 9 pixels. A gate
computed from the content, the same one for every stream, weighs their channels before they are added, so a
block can answer to a logo and to a whole coat. A light 3x3 is a 1x1 followed by a depthwise 3x3: a ninth of
the work of a dense one. OSNet-IBN and OSNet-AIN put instance norms where a camera's colours would otherwise
enter; the places of AIN were found by search.

Shapes:
    `(N, 3, 256, 128)` -> 64 x 1/2 -> 256 x 1/4 -> 384 x 1/8 -> 512 x 1/16 -> pooled 512 -> embedding
    `(N, 512)`, non-negative and not normalised -> logits `(N, num_classes)`. The cards count no classes, and
    then the embedding is the answer. Any size from 13 pixels; AIN needs one side of
    at least 29, because a map of one place has no instance norm.

Differs:
    The official network gives the embedding in eval mode whatever its classes; ours gives the logits, and
    `forward_head(x, pre_logits=True)` the embedding. `fc` is a 1x1 convolution, so it also runs on maps.
    Stochastic depth, `width` (channels in multiples of 8; the embedding stays 512), `stem_stride` and
    `streams` are additions. There is no `fuse()`: merging the two halves of a light 3x3 would make it dearer.

References: Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", arXiv 1905.00953, section
3; "Learning Generalisable Omni-Scale Representations for Person Re-Identification", arXiv 1910.06827.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.layouts import rename
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.errors import UsageError
from featherweight.registry import register_model

CHANNELS = (64, 256, 384, 512)
"""Of the stem and the three stages, at width 1."""

EMBEDDING = 512
STREAMS = (1, 2, 3, 4)
"""Light convolutions of each stream: the scales of a block."""

PLAIN, INSIDE, OUTSIDE = "plain", "inside", "outside"
"""Where instance norm stands: nowhere, in place of a branch's last batch norm, or after the sum."""

PLACES = {
    "osnet": (PLAIN,) * 7,
    "osnet_ibn": (INSIDE, OUTSIDE, OUTSIDE, PLAIN, PLAIN, PLAIN, PLAIN),
    "osnet_ain": (INSIDE, INSIDE, INSIDE, PLAIN, INSIDE, INSIDE, PLAIN),
}
"""Instance norm of the stem, then of the six blocks."""

InstanceNorm = functools.partial(nn.InstanceNorm2d, affine=True)


def light_conv(channels: int) -> nn.Sequential:
    """Build a 1x1 and a depthwise 3x3 convolution, with nothing between them, `(N, channels, H, W)`."""
    pointwise = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(pointwise, ConvNormAct(channels, channels, 3, groups=channels))


class OmniScaleBlock(nn.Module):
    """Streams of different depth between two 1x1 convolutions, added under one gate, and a shortcut.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; a quarter of them runs in the streams.
        streams: light convolutions of each stream.
        place: where the block has an instance norm: `PLAIN`, `INSIDE` or `OUTSIDE`.
        drop_path: probability of dropping the branch during training.

    >>> block = OmniScaleBlock(64, 256)
    >>> sum(p.numel() for p in block.parameters())
    86596
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        streams: Sequence[int] = STREAMS,
        place: str = PLAIN,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        middle = out_channels // 4
        self.squeeze = ConvNormAct(in_channels, middle, 1)
        self.streams = nn.ModuleList(
            nn.Sequential(*(light_conv(middle) for _ in range(depth))) for depth in streams
        )
        self.gate = SqueezeExcite(middle, max(1, middle // 16), gate=nn.Sigmoid)
        norm = InstanceNorm if place == INSIDE else nn.BatchNorm2d
        self.expand = ConvNormAct(middle, out_channels, 1, act=None, norm=norm)
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = ConvNormAct(in_channels, out_channels, 1, act=None)
        self.norm: nn.Module = InstanceNorm(out_channels) if place == OUTSIDE else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, out_channels, H, W)`."""
        u = self.squeeze(x)  # (N, out_channels / 4, H, W)
        gated = [self.gate(stream(u)) for stream in self.streams]
        v = functools.reduce(operator.add, gated)
        return self.act(self.norm(self.drop_path(self.expand(v)) + self.shortcut(x)))


def transition(channels: int) -> nn.Sequential:
    """Build what halves the map after a stage: `(N, channels, H, W)` to `(N, channels, H // 2, W // 2)`."""
    return nn.Sequential(ConvNormAct(channels, channels, 1), nn.AvgPool2d(2))


class OSNet(Classifier):
    """OSNet, OSNet-IBN and OSNet-AIN.

    Args:
        width: multiplies every channel count but the embedding's 512.
        places: where instance norms stand: of the stem, then of the six blocks.
        streams: light convolutions of each stream of a block.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: a place is unknown, or there are not seven; there is no stream.

    >>> OSNet(0.25, num_classes=0).head_hidden_size
    512
    """

    def __init__(
        self,
        width: float = 1.0,
        places: Sequence[str] = PLACES["osnet"],
        streams: Sequence[int] = STREAMS,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _check(places, streams)
        stem, *stages = (make_divisible(channels * width) for channels in CHANNELS)
        rates = drop_path_rates(drop_path_rate, 6)
        norm = nn.BatchNorm2d if places[0] == PLAIN else InstanceNorm
        channels, reduction = stem, 2 * stem_stride
        body: list[nn.Module] = [ConvNormAct(in_chans, stem, 7, stem_stride, norm=norm)]
        body.append(nn.MaxPool2d(3, stride=2, padding=1))
        levels = [(stem, stem_stride), (stem, reduction)]
        for stage, out in enumerate(stages):
            for index in (2 * stage, 2 * stage + 1):
                body.append(OmniScaleBlock(channels, out, streams, places[1 + index], rates[index]))
                channels = out
                levels.append((out, reduction))
            last = stage == len(stages) - 1
            body.append(ConvNormAct(out, out, 1) if last else transition(out))
            reduction *= 1 if last else 2
            levels.append((out, reduction))
        head = ConvNormAct(channels, EMBEDDING, 1, bias=True)
        defaults = {"input_size": (3, 256, 128), "interpolation": "bilinear", **kwargs}
        super().__init__(
            nn.Sequential(*body),
            levels,
            channels,
            head=head,
            head_hidden_size=EMBEDDING,
            in_chans=in_chans,
            **defaults,
        )
        self.default_cfg["crop_pct"] = 1.0  # a crop of a person is resized whole
        self.apply(_init_weights)
        nn.init.normal_(head.conv.weight, 0, 0.01)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of either official file; the streams and transitions are called otherwise in AIN's.

        A classifier of training identities is left out where this network has none.
        """
        renamed = dict(state)
        for rules in (_PLACE_RULES, _PIECE_RULES, _LEAF_RULES):
            renamed = rename(renamed, rules)
        # Inside the branch, instance norm stands where the batch norm of the last convolution was.
        inside = [f"body.{i}" for i, m in enumerate(self.body) if _has_instance_norm_inside(m)]
        renamed = rename(renamed, [(rf"{block}\.IN\.", f"{block}.expand.norm.") for block in inside])
        renamed = rename(renamed, [(r"(body\.\d+)\.IN\.", r"\1.norm.")])
        renamed["head.conv.weight"] = renamed["head.conv.weight"][:, :, None, None]
        if self.num_classes == 0:
            renamed = {key: value for key, value in renamed.items() if not key.startswith("classifier.")}
        return renamed


def _check(places: Sequence[str], streams: Sequence[int]) -> None:
    known = (PLAIN, INSIDE, OUTSIDE)
    if len(places) != 7 or any(place not in known for place in places):
        raise UsageError(f"Instance norms at {tuple(places)}. Expected seven of {', '.join(known)}.")
    if not streams or min(streams) < 1:
        raise UsageError(
            f"Streams of {tuple(streams)} convolutions. Expected one or more, each of 1 or more."
        )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


_PLACE_RULES = [
    (r"conv1\.", "body.0."),
    *((rf"conv{s}\.{i}\.", f"body.{3 * s - 4 + i}.") for s in (2, 3, 4) for i in (0, 1)),
    (r"(conv2\.2|pool2)\.0\.", "body.4.0."),
    (r"(conv3\.2|pool3)\.0\.", "body.7.0."),
    (r"conv5\.", "body.10."),
    (r"fc\.0\.", "head.conv."),
    (r"fc\.1\.", "head.norm."),
]
_PIECE_RULES = [
    (r"(body\.\d+)\.conv1\.", r"\1.squeeze."),
    (r"(body\.\d+)\.conv2a\.", r"\1.streams.0.0."),
    *((rf"(body\.\d+)\.conv2{name}\.", rf"\1.streams.{t}.") for t, name in ((1, "b"), (2, "c"), (3, "d"))),
    (r"(body\.\d+)\.conv2\.(\d)\.layers\.", r"\1.streams.\2."),
    (r"(body\.\d+)\.conv3\.", r"\1.expand."),
    (r"(body\.\d+)\.downsample\.", r"\1.shortcut."),
    (r"(body\.\d+)\.gate\.fc1\.", r"\1.gate.reduce."),
    (r"(body\.\d+)\.gate\.fc2\.", r"\1.gate.expand."),
]
_LEAF_RULES = [
    (r"(.*\.streams\.\d\.\d)\.conv1\.", r"\1.0."),
    (r"(.*\.streams\.\d\.\d)\.conv2\.", r"\1.1.conv."),
    (r"(.*\.streams\.\d\.\d)\.bn\.", r"\1.1.norm."),
    (r"(.*)\.bn\.", r"\1.norm."),
]


def _has_instance_norm_inside(module: nn.Module) -> bool:
    return isinstance(module, OmniScaleBlock) and isinstance(module.expand.norm, nn.InstanceNorm2d)


@register_model
def osnet_x1_0(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet at width 1."""
    return OSNet(width, PLACES["osnet"], **kwargs)


@register_model
def osnet_x0_75(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet at width 0.75."""
    return OSNet(0.75 * width, PLACES["osnet"], **kwargs)


@register_model
def osnet_x0_5(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet at width 0.5."""
    return OSNet(0.5 * width, PLACES["osnet"], **kwargs)


@register_model
def osnet_x0_25(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet at width 0.25."""
    return OSNet(0.25 * width, PLACES["osnet"], **kwargs)


@register_model
def osnet_ibn_x1_0(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet-IBN at width 1."""
    return OSNet(width, PLACES["osnet_ibn"], **kwargs)


@register_model
def osnet_ain_x1_0(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet-AIN at width 1."""
    return OSNet(width, PLACES["osnet_ain"], **kwargs)


@register_model
def osnet_ain_x0_75(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet-AIN at width 0.75."""
    return OSNet(0.75 * width, PLACES["osnet_ain"], **kwargs)


@register_model
def osnet_ain_x0_5(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet-AIN at width 0.5."""
    return OSNet(0.5 * width, PLACES["osnet_ain"], **kwargs)


@register_model
def osnet_ain_x0_25(width: float = 1.0, **kwargs: Any) -> OSNet:
    """OSNet-AIN at width 0.25."""
    return OSNet(0.25 * width, PLACES["osnet_ain"], **kwargs)
