"""AFFNet's claim in miniature: an adaptive filter in the frequency domain against other token mixers, on
CIFAR-10.

The paper (sections 3 and 4.4) says that a mask computed from the spectrum mixes tokens globally and adapts to
the image, at the cost of a small convolution. The same small network is trained with four token mixers: the
adaptive filter; a depthwise convolution whose kernel is just large enough that it costs no less; a filter as
large as the map that is learned but the same for every image; and none. The trained mixers are then asked
how far they reach: the part of the map that the middle of what they add depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.inverted_residual import InvertedResidual
from featherweight.blocks.spectrum import multiply, to_image, to_spectrum
from featherweight.measure.count import count
from featherweight.models.affnet import AFFStage, FrequencyFilter, MapNorm
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, Reproduction, judge, mean_spread, overall

CLAIM = (
    "The adaptive frequency filter beats a depthwise convolution of no lower cost, a fixed global filter and "
    "no token mixer, and it reaches further than the convolution."
)
OURS, DEPTHWISE, FIXED, NONE = "adaptive filter", "depthwise convolution", "fixed global filter", "none"
STAGES = ((32, 16), (48, 8))
"""Channels and side in pixels of the two mixing stages."""

REACH = 0.01
"""A place counts as reached if its mean gradient exceeds this part of the largest one."""


class FixedFilter(nn.Module):
    """Multiply the spectrum of a `side` x `side` map by a learned mask, the same for every image."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(0.02 * torch.randn(channels, 2, side, side // 2 + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Filter and add the input, as the adaptive filter does."""
        return x + to_image(multiply(self.mask[None], to_spectrum(x)), x)


class Depthwise(nn.Module):
    """A depthwise convolution and its input."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        kernel = fair_kernel(channels, side)
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Filter and add the input, as the adaptive filter does."""
        return x + self.conv(x)


MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    OURS: lambda channels, side: FrequencyFilter(channels),
    DEPTHWISE: Depthwise,
    FIXED: FixedFilter,
    NONE: lambda channels, side: nn.Identity(),
}


def transform_macs(channels: int, side: int) -> int:
    """Estimate a real transform and its inverse as 2.5 N log2 N operations each, two to a multiply-add."""
    return round(2.5 * channels * side**2 * math.log2(side**2))


def fair_kernel(channels: int, side: int) -> int:
    """Return the smallest odd kernel with which a depthwise convolution costs no less than our filter."""
    maps = count(FrequencyFilter(channels), (channels, side, side)).macs
    budget = (maps + transform_macs(channels, side)) / (channels * side**2)
    return next(kernel for kernel in range(3, side * 2, 2) if kernel**2 >= budget)


def mini(mixer: str) -> nn.Sequential:
    """Build the network `(N, 3, 32, 32)` to `(N, 10)` with one of `MIXERS`."""
    layers: list[nn.Module] = [ConvNormAct(3, 16, 3, act=nn.SiLU)]
    channels = 16
    for out, side in STAGES:
        stage = AFFStage(out, [0.0, 0.0], nn.SiLU, MapNorm)
        for block in stage.blocks:
            block.token_mixer = MIXERS[mixer](out, side)
        layers += [InvertedResidual(channels, out, 2, 2, act=nn.SiLU), stage]
        channels = out
    head = [ConvNormAct(channels, 4 * channels, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(4 * channels, 10))


def reach(model: nn.Sequential) -> float:
    """Return the part of its map on which the middle of what the first mixer adds depends."""
    channels, side = STAGES[0]
    x = torch.randn(8, channels, side, side, generator=torch.Generator().manual_seed(0), requires_grad=True)
    added = model.cpu().eval()[2].blocks[0].token_mixer(x) - x
    (gradient,) = torch.autograd.grad(added[:, :, side // 2, side // 2].sum(), x)
    seen = gradient.abs().mean((0, 1))
    return float((seen > REACH * seen.max()).float().mean())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the network with each mixer and compare accuracy and reach."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(600, 12_000),
        test_images=(300, 10_000),
        epochs=8,
        optimizer="adamw",
        lr=4e-3,
        batch_size=128,
        weight_decay=0.02,
        label_smoothing=0.0,
    )
    trained: dict[str, nn.Sequential] = {}

    def builder(name: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            trained[name] = mini(name)
            return trained[name]

        return build

    found, images = accuracies({name: builder(name) for name in MIXERS}, plan, data_root, progress)
    verdicts = {name: judge(found[OURS], found[name], images) for name in MIXERS if name != OURS}
    parts = {name: reach(model) for name, model in trained.items()}
    rows = []
    for name in MIXERS:
        counted = sizes(lambda name=name: mini(name), (3, 32, 32))
        transforms = sum(2 * transform_macs(*stage) for stage in STAGES) if name in (OURS, FIXED) else 0
        rows.append(
            {
                "token mixer": name,
                "params": counted["params"],
                "macs": counted["macs"] + transforms,
                "test accuracy": mean_spread(found[name]),
                "reach": f"{parts[name]:.0%} of the map",
                "claim": verdicts.get(name, "baseline"),
            }
        )
    far = HOLDS if parts[OURS] > parts[DEPTHWISE] else FAILS
    reason = "; ".join(f"against '{name}': {verdict}" for name, verdict in verdicts.items())
    reason += f"; reach {parts[OURS]:.0%} against {parts[DEPTHWISE]:.0%} for the depthwise convolution: {far}"
    verdict = overall([*verdicts.values(), far])
    return Reproduction("affnet", CLAIM, rows, verdict, reason, found, plan.setting())
