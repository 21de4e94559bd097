"""SugarcaneShuffleNet: ShuffleNetV2 with a two-layer head, for transfer to a small set of photographs.

ShuffleNetV2 passes half of its channels through each unit untouched and shuffles the halves afterwards: every
convolution works on half the channels, with equal input and output widths, which costs the fewest memory
accesses. The sugarcane network keeps that body with its ImageNet weights, freezes the first few per cent of
its tensors and trains a regularised head of two linear layers.

Shapes:
    `(N, 3, 224, 224)` -> 24 x 1/2 -> pool 24 x 1/4 -> 116 x 1/8 -> 232 x 1/16 -> 464 x 1/32 -> 1024 x 1/32 ->
    logits `(N, 1000)`, or the head 1024 -> 1024 -> `(N, 17)`. With `stem_stride=1` the max pool is left out
    as well, so that every map is four times as wide: for images of 32 to 64 pixels.

Differs:
    The extra `width` scales all channels, the last 1024 included, and rounds to multiples of 4. The head's
    default dropouts are those of the best trial in the authors' log (0.2451 and 0.2633); the first belongs to
    the head, the second is `drop_rate`. The batch norm in the head needs at least two images in a training
    batch.

References: Arman et al., "SugarcaneShuffleNet", arXiv 2508.17107; Ma et al., "ShuffleNet V2:
Practical Guidelines for Efficient CNN Architecture Design", arXiv 1807.11164, table 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.layouts import rename
from featherweight.errors import UsageError
from featherweight.registry import register_model

REPEATS = (4, 8, 4)
CHANNELS = {
    "050": (24, 48, 96, 192, 1024),
    "100": (24, 116, 232, 464, 1024),
    "150": (24, 176, 352, 704, 1024),
    "200": (24, 244, 488, 976, 2048),
}
"""Channels of the stem, the three stages and the last convolution."""

LAST = 18
"""Position of the last 1x1 convolution in the body: after the stem, the max pool and 16 units."""


def shuffle_halves(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels: output 2i is from the first half, 2i + 1 from the second.

    >>> shuffle_halves(torch.arange(4).view(1, 4, 1, 1)).flatten().tolist()
    [0, 2, 1, 3]
    """
    return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Stride 1: half of the channels pass, half are filtered. Stride 2: two branches on all channels.

    `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`.

    Args:
        in_channels: channels of the input; equal to `out_channels` at stride 1.
        out_channels: channels of the output, an even number.
        stride: 1 or 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.stride = stride
        self.left: nn.Module = nn.Identity()
        if stride > 1:
            self.left = nn.Sequential(
                ConvNormAct(in_channels, in_channels, 3, stride, groups=in_channels, act=None),
                ConvNormAct(in_channels, half, 1),
            )
        self.right = nn.Sequential(
            ConvNormAct(in_channels if stride > 1 else half, half, 1),
            ConvNormAct(half, half, 3, stride, groups=half, act=None),
            ConvNormAct(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Filter, join, shuffle."""
        left, right = (x, x) if self.stride > 1 else x.chunk(2, 1)
        return shuffle_halves(torch.cat((self.left(left), self.right(right)), 1))


class ShuffleNetV2(Classifier):
    """ShuffleNetV2 with torchvision's layers.

    Args:
        channels: channels of the stem, the three stages and the last convolution.
        width: multiplies them all; results are rounded to multiples of 4.
        stem_stride: stride of the first convolution, in pixels; 1 also leaves out the max pool.
        in_chans: channels of the image.
        drop_path_rate: accepted for a common signature; the units have no residual branch to drop.
        **kwargs: see `Classifier`.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = CHANNELS["100"],
        width: float = 1.0,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        del drop_path_rate
        stem, *stages, last = (make_divisible(c * width, 4) for c in channels)
        pooled = stem_stride > 1
        body: list[nn.Module] = [ConvNormAct(in_chans, stem, 3, stem_stride)]
        body.append(nn.MaxPool2d(3, 2, padding=1) if pooled else nn.Identity())
        reduction = stem_stride * (2 if pooled else 1)
        levels = [(stem, stem_stride), (stem, reduction)]
        previous = stem
        for out, repeats in zip(stages, REPEATS, strict=True):
            reduction *= 2
            for index in range(repeats):
                body.append(ShuffleUnit(previous, out, 2 if index == 0 else 1))
                levels.append((out, reduction))
                previous = out
        body.append(ConvNormAct(previous, last, 1))
        super().__init__(nn.Sequential(*body), levels, last, in_chans=in_chans, **kwargs)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename torchvision's keys to ours."""
        return rename(state, [*_body_rules(), (r"fc\.", "classifier.")])


class SugarcaneShuffleNet(ShuffleNetV2):
    """ShuffleNetV2 with the head dropout, linear, ReLU, batch norm, dropout, linear.

    Args:
        head_drop_rate: dropout before the first linear layer.
        drop_rate: dropout before the second.
        width: multiplies all channels, the head's included.
        **kwargs: see `ShuffleNetV2`.

    Raises:
        UsageError: the head was asked to work on a map that is not pooled.
    """

    def __init__(
        self,
        head_drop_rate: float = 0.2451,
        drop_rate: float = 0.2633,
        width: float = 1.0,
        **kwargs: Any,
    ) -> None:
        hidden = make_divisible(CHANNELS["100"][-1] * width, 4)
        # The activation comes before the normalisation here, as in the authors' code.
        head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(head_drop_rate),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.BatchNorm1d(hidden),
        )
        super().__init__(width=width, head=head, head_hidden_size=hidden, drop_rate=drop_rate, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one with `num_classes` outputs; 0 removes it.

        Raises:
            UsageError: the pooling is unknown or none, which the head does not take.
        """
        if not (self.global_pool if global_pool is None else global_pool):
            raise UsageError("SugarcaneShuffleNet's head needs pooled features: global_pool='avg' or 'max'.")
        super().reset_classifier(num_classes, global_pool)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the authors' keys (`base_model.…`) to ours; torchvision's body loads with a fresh head."""
        bare = {key.removeprefix("base_model."): value for key, value in state.items()}
        rules = [(r"fc\.1\.", "head.2."), (r"fc\.3\.", "head.4."), (r"fc\.5\.", "classifier.")]
        if "fc.weight" in bare:
            bare = {key: value for key, value in bare.items() if not key.startswith("fc.")}
            fresh = {key: value for key, value in self.state_dict().items() if not key.startswith("body.")}
            return rename(bare, _body_rules()) | fresh
        return rename(bare, [*_body_rules(), *rules])


def freeze_fraction(model: ShuffleNetV2, fraction: float) -> int:
    """Freeze the first tensors of a network by the authors' rule and return how many.

    They count the parameter tensors of the plain ImageNet network, its last layer (two tensors) included, and
    freeze the first `floor(fraction * count)`. Running statistics of frozen batch norms still follow the data
    in training.

    >>> freeze_fraction(SugarcaneShuffleNet(num_classes=17), 0.05)
    8

    Raises:
        UsageError: the fraction is not from 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"Cannot freeze the fraction {fraction}. Expected a number from 0 to 1.")
    tensors = list(model.body.parameters())
    frozen = tensors[: int(fraction * (len(tensors) + 2))]
    for tensor in frozen:
        tensor.requires_grad_(False)
    return len(frozen)


def _body_rules() -> list[tuple[str, str]]:
    rules = [
        (r"conv1\.0\.", "body.0.conv."),
        (r"conv1\.1\.", "body.0.norm."),
        (r"conv5\.0\.", f"body.{LAST}.conv."),
        (r"conv5\.1\.", f"body.{LAST}.norm."),
    ]
    left = (("0", "0.conv"), ("1", "0.norm"), ("2", "1.conv"), ("3", "1.norm"))
    right = (
        ("0", "0.conv"),
        ("1", "0.norm"),
        ("3", "1.conv"),
        ("4", "1.norm"),
        ("5", "2.conv"),
        ("6", "2.norm"),
    )
    position = 1
    for stage, repeats in enumerate(REPEATS, start=2):
        for unit in range(repeats):
            position += 1
            old, new = rf"stage{stage}\.{unit}\.", f"body.{position}."
            rules += [(rf"{old}branch1\.{index}\.", f"{new}left.{part}.") for index, part in left]
            rules += [(rf"{old}branch2\.{index}\.", f"{new}right.{part}.") for index, part in right]
    return rules


@register_model
def sugarcane_shufflenet(**kwargs: Any) -> SugarcaneShuffleNet:
    """The sugarcane network; a dropout rate of 0 leaves the published one in place."""
    kwargs["drop_rate"] = kwargs.get("drop_rate") or 0.2633
    return SugarcaneShuffleNet(**kwargs)


@register_model
def shufflenetv2_050(**kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 at width 0.5."""
    return ShuffleNetV2(CHANNELS["050"], **kwargs)


@register_model
def shufflenetv2_100(**kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 at width 1."""
    return ShuffleNetV2(CHANNELS["100"], **kwargs)


@register_model
def shufflenetv2_150(**kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 at width 1.5."""
    return ShuffleNetV2(CHANNELS["150"], **kwargs)


@register_model
def shufflenetv2_200(**kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 at width 2."""
    return ShuffleNetV2(CHANNELS["200"], **kwargs)
