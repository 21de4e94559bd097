"""OSNet's claim in miniature: streams of four scales against one scale at equal MACs, on Fashion-MNIST.

The paper (section 3) adds streams that see 3, 5, 7 and 9 pixels under one gate. Both rivals are OSNets with
the same gate, stem, stages and head, and MACs within 2 %: one has the same ten light convolutions per block
as ten streams of one each, so that every stream sees 3 pixels (its parameters are equal as well); the other
has a single stream of four, which sees 9 pixels, and more channels instead. Beating only the first could be
depth rather than scales, so the claim holds only if both are beaten.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from torch import nn

from featherweight.registry import create_model
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = "At equal MACs, streams of four scales under one gate beat streams of a single scale, small or large."
SIDE = 28
OMNI, SMALL, LARGE = (
    "four scales: 3, 5, 7, 9",
    "single scale: ten streams of 3",
    "single scale: one stream of 9",
)
NETS = {OMNI: (1.0, (1, 2, 3, 4)), SMALL: (1.0, (1,) * 10), LARGE: (1.13, (4,))}
"""Width, relative to OSNet x0.25, and light convolutions of each stream."""


def build(name: str) -> nn.Module:
    """Build one of the nets for grey images; a stem stride of 1 keeps maps of 14, 7 and 3 pixels."""
    width, streams = NETS[name]
    return create_model(
        "osnet_x0_25", width=width, streams=streams, stem_stride=1, num_classes=10, in_chans=1
    )


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three nets for equal epochs and compare."""
    plan = Plan.sized(
        quick,
        seed,
        data="fashion-mnist",
        train_images=(320, 5_000),
        test_images=(200, 5_000),
        side=SIDE,
        epochs=4,
        lr=0.05,
        batch_size=64,
        weight_decay=5e-4,
        label_smoothing=0.1,
        bf16=False,
    )
    builders = {name: functools.partial(build, name) for name in NETS}
    found, images = accuracies(builders, plan, data_root, progress)
    rows = [
        {"network": name, **sizes(make, (1, SIDE, SIDE)), "test accuracy": mean_spread(found[name])}
        for name, make in builders.items()
    ]
    verdicts = {name: judge(found[OMNI], found[name], images) for name in (SMALL, LARGE)}
    omni, *rivals = rows
    reason = f"{omni['test accuracy']} at {omni['macs']:,} MACs against " + "; ".join(
        f"{row['network']}: {row['test accuracy']} at {row['macs']:,} ({verdicts[row['network']]})"
        for row in rivals
    )
    return Reproduction("osnet", CLAIM, rows, overall(list(verdicts.values())), reason, found, plan.setting())
