"""LSNet's claim in miniature, on CIFAR-10: seeing a large window and summing a small one beats either alone.

The paper (section 3.2) splits token mixing into perception and aggregation. Here the mixer of every odd block
of a small LSNet-like network is one of three: LS convolution (weights from 7x7, sum over 3x3), its large half
(one static 7x7 depthwise convolution in the same kind of bottleneck both sees and sums) and its small half
(3x3 sees and 3x3 sums). The channels of the bottlenecks make the MACs of all three equal to within 2 %, the
aggregation counted as nine multiply-adds per value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.ls_conv import TAPS, LSConv
from featherweight.models.lsnet import Block
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = (
    "At equal MACs, LS convolution (7x7 sees, 3x3 sums) beats a 7x7 that does both and a 3x3 that does both."
)
OURS, LARGE, SMALL = (
    "LS: 7x7 sees, 3x3 sums",
    "large half: 7x7 sees and sums",
    "small half: 3x3 sees and sums",
)
STAGES = ((40, 4, 256), (80, 4, 64))
"""Channels, blocks and positions of each stage for images of 32 pixels."""


def ls_macs(channels: int, hidden: int, window: int) -> int:
    """Return the multiply-adds of `LSConv` per position, the aggregation included."""
    perceive = hidden * (channels + window**2 + hidden + TAPS * channels // 8)
    return perceive + TAPS * channels


def static_macs(channels: int, hidden: int) -> int:
    """Return the multiply-adds of `StaticLarge` per position."""
    return hidden * (2 * channels + 49)


def closest(macs: Callable[[int], int], channels: int) -> int:
    """Return the hidden channels for which `macs` comes closest to the published LS convolution."""
    budget = ls_macs(channels, channels // 2, 7)
    return min(range(1, 2 * channels), key=lambda hidden: abs(macs(hidden) - budget))


class StaticLarge(nn.Module):
    """A static 7x7 depthwise convolution in a bottleneck, plus the input; keeps the shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(channels, hidden, 1),
            ConvNormAct(hidden, hidden, 7, groups=hidden),
            ConvNormAct(hidden, channels, 1, act=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        return self.body(x) + x


def mixer(form: str, channels: int) -> nn.Module:
    """Build one of the three mixers."""
    if form == OURS:
        return LSConv(channels)
    if form == LARGE:
        return StaticLarge(channels, closest(partial(static_macs, channels), channels))
    hidden = closest(lambda hidden: ls_macs(channels, hidden, 3), channels)
    return LSConv(channels, window=3, hidden=hidden)


def network(form: str) -> nn.Module:
    """Build two stages, 16 and 8 pixels wide, whose odd blocks mix in the given form."""
    first = STAGES[0][0]
    layers: list[nn.Module] = [ConvNormAct(3, first // 2, 3, 2), ConvNormAct(first // 2, first, 3, act=None)]
    before = first
    for channels, depth, _ in STAGES:
        if channels != before:
            layers += [
                ConvNormAct(before, before, 3, 2, before, None),
                ConvNormAct(before, channels, 1, act=None),
            ]
        for index in range(depth):
            block = Block(channels, stage=0, index=index)
            if index % 2:
                block.mixer = mixer(form, channels)
            layers.append(block)
        before = channels
    head = (nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(before), nn.Flatten(), nn.Linear(before, 10))
    return nn.Sequential(*layers, *head)


def aggregation_macs(form: str) -> int:
    """Return the multiply-adds between activations, which the counter of layers leaves out."""
    if form == LARGE:
        return 0
    return sum(TAPS * channels * positions * (depth // 2) for channels, depth, positions in STAGES)


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three networks for equal epochs and compare."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(1_000, 12_000),
        test_images=(500, 10_000),
        epochs=8,
        optimizer="adamw",
        lr=3e-3,
        batch_size=128,
        weight_decay=0.025,
        label_smoothing=0.1,
    )
    builders = {form: partial(network, form) for form in (OURS, LARGE, SMALL)}
    found, images = accuracies(builders, plan, data_root, progress)
    rows = []
    for form, build in builders.items():
        counted = sizes(build, (3, 32, 32))
        counted["macs"] += aggregation_macs(form)
        rows.append({"mixer": form, **counted, "test accuracy": mean_spread(found[form])})
    verdicts = [judge(found[OURS], found[other], images) for other in (LARGE, SMALL)]
    reason = (
        f"{rows[0]['test accuracy']} against {rows[1]['test accuracy']} for the large half ({verdicts[0]}) "
        f"and {rows[2]['test accuracy']} for the small half ({verdicts[1]})"
    )
    return Reproduction("lsnet", CLAIM, rows, overall(verdicts), reason, found, plan.setting())
