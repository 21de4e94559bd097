"""SpaRTAN's two mixers in miniature, on CIFAR-10 at 32 pixels.

The paper replaces the usual MLP of two 1x1 convolutions by a channel mixer of gated products and rotated
pairs, and gives its spatial mixer a second path that sees further. The reduced network is trained as it is,
with every channel mixer replaced by an MLP of the same parameters (within 1 %), and with the far path not
dilated: 5x5 pixels instead of 9x9 at the same parameters and MACs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from featherweight.models.spartan import ChannelMixer, SpaRTAN, SpartanBlock
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = (
    "At equal parameters, SpaRTAN's channel mixer beats an MLP, and its dilated path one without dilation."
)
FULL = "SpaRTAN"
MLP = "MLP for the channel mixer"
NEAR = "no dilation in the far path"


def spartan() -> SpaRTAN:
    """Build the reduced network for 32 pixels: maps of 16, 8, 4 and 2."""
    return SpaRTAN((1, 1, 2, 1), (16, 32, 64, 128), num_classes=10, stem_stride=1)


def mlp(mixer: ChannelMixer) -> nn.Module:
    """Build an MLP with as many parameters as the channel mixer, drawn by the same rule."""
    channels = mixer.theta.in_channels
    budget = sum(p.numel() for p in mixer.parameters())
    hidden = round((budget - channels) / (2 * channels + 1))
    layers = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))
    for conv in (layers[0], layers[2]):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        nn.init.zeros_(conv.bias)
    return layers


def with_mlp() -> SpaRTAN:
    """Build the network with an MLP in each block."""
    model = spartan()
    for block in model.body:
        if isinstance(block, SpartanBlock):
            block.channel = mlp(block.channel)
    return model


def without_dilation() -> SpaRTAN:
    """Build the network whose far path has two plain 3x3 convolutions."""
    model = spartan()
    for block in model.body:
        if isinstance(block, SpartanBlock):
            for conv in block.spatial.far[:2]:
                conv.dilation = conv.padding = (1, 1)
    return model


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three networks for equal epochs and compare the first with each other one."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(500, 8_000),
        test_images=(500, 10_000),
        epochs=4,
        optimizer="adamw",
        lr=4e-3,
        weight_decay=0.03,
        batch_size=64,
        label_smoothing=0.0,
        bf16=False,
    )
    builders: dict[str, Callable[[], nn.Module]] = {FULL: spartan, MLP: with_mlp, NEAR: without_dilation}
    found, images = accuracies(builders, plan, data_root, progress)
    verdicts = {name: judge(found[FULL], found[name], images) for name in (MLP, NEAR)}
    rows = [
        {
            "network": name,
            **sizes(build, (3, 32, 32)),
            "test accuracy": mean_spread(found[name]),
            "claim": verdicts.get(name, "baseline"),
        }
        for name, build in builders.items()
    ]
    reason = "; ".join(f"against '{name}': {verdict}" for name, verdict in verdicts.items())
    return Reproduction(
        "spartan", CLAIM, rows, overall(list(verdicts.values())), reason, found, plan.setting()
    )
