"""EMOv2's claim in miniature: attention in near and remote windows together beats either one, on CIFAR-10.

Both partitions share queries, keys and values, so near, remote and spanning attention have equal parameters
and equal MACs in layers (section 3 of the paper); only the products of attention double. A net of one
convolutional stage (16 x 16) and one attending stage (8 x 8, windows of 4) is trained with each, and with
plain convolution in their place, whose wider middle makes up for the parameters of queries and keys. Layer
scales start at 1, not 1e-6, for the training is short.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from featherweight.models.emov2 import EMOv2
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = (
    "At equal parameters, attention in near and remote windows together beats either alone and convolution."
)
KINDS = {"spanning": "hybrid", "near windows": "near", "remote windows": "remote", "convolution": "none"}
"""Configuration -> `attention` of `EMOv2`; the first is the paper's."""

EXPANSION, PLAIN_EXPANSION = 3, 3.64
"""Widening of the second stage; the larger one gives the convolutional net as many parameters."""


def tiny(attention: str) -> nn.Module:
    """Build the net for 32 pixels and 10 classes with one kind of attention."""
    return EMOv2(
        depths=(1, 4),
        channels=(24, 48),
        expansions=(2, EXPANSION if attention != "none" else PLAIN_EXPANSION),
        head_dim=16,
        attention=attention,
        first_attending=1,
        window=4,
        layer_scale=1.0,
        stem_stride=1,
        num_classes=10,
    )


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the four nets for equal epochs and compare the first with each of the others."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(640, 12_000),
        test_images=(500, 10_000),
        epochs=6,
        optimizer="adamw",
        lr=3e-3,
        weight_decay=0.02,
        batch_size=128,
        bf16=False,
    )
    builders = {name: functools.partial(tiny, kind) for name, kind in KINDS.items()}
    found, images = accuracies(builders, plan, data_root, progress)
    rows = [
        {"network": name, **sizes(build, (3, 32, 32)), "test accuracy": mean_spread(found[name])}
        for name, build in builders.items()
    ]
    ours, *others = builders
    verdicts = {name: judge(found[ours], found[name], images) for name in others}
    against = "; ".join(
        f"against {row['network']} {row['test accuracy']}: {verdicts[row['network']]}" for row in rows[1:]
    )
    reason = f"{ours} {rows[0]['test accuracy']} {against}"
    return Reproduction("emov2", CLAIM, rows, overall(list(verdicts.values())), reason, found, plan.setting())
