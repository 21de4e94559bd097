"""SimpleNet's claim in miniature: more accuracy per parameter than a plain net of the same size, on
Fashion-MNIST.

The paper's rules (section 3): widen gradually, keep the resolution as long as affordable, 1x1 kernels only
near the end. The slim SimpleNet (310k) is trained against a plain net that breaks them: one width for all
layers, and early pooling. Both have 3x3 convolutions, batch norm and ReLU, a global maximum at the end, and
parameters within 2 %.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.registry import create_model
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread

CLAIM = "At equal parameters, SimpleNet's gradual widths and late pooling beat one width with early pooling."
OURS, PLAIN = "simplenet_cifar_310k", "plain: uniform width, early pooling"
PLAIN_WIDTH, PLAIN_LAYERS, PLAIN_POOLS = 62, 10, (0, 1, 2)
"""Ten 3x3 layers of 62 channels hold 1 % more parameters than SimpleNet; pools follow the first three."""


def simplenet() -> nn.Module:
    """Build the slim SimpleNet for grey images."""
    return create_model("simplenet_cifar_310k", num_classes=10, in_chans=1)


def plain() -> nn.Module:
    """Build the plain net."""
    layers: list[nn.Module] = []
    for index in range(PLAIN_LAYERS):
        layers.append(ConvNormAct(PLAIN_WIDTH if index else 1, PLAIN_WIDTH, 3, bias=True, momentum=0.05))
        if index in PLAIN_POOLS:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(PLAIN_WIDTH, 10))


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train both nets for equal epochs and compare."""
    plan = Plan(
        data="fashion-mnist",
        train_images=1_000 if quick else 12_000,
        test_images=500 if quick else 10_000,
        side=28,
        epochs=1 if quick else 6,
        seeds=(seed,) if quick else (seed, seed + 1, seed + 2),
        recipe={"lr": 0.05, "batch_size": 128, "weight_decay": 5e-4, "label_smoothing": 0.0},
    )
    builders = {OURS: simplenet, PLAIN: plain}
    found, images = accuracies(builders, plan, data_root, progress)
    rows = []
    for name, build in builders.items():
        counted = sizes(build, (1, 28, 28))
        mean = sum(found[name]) / len(found[name])
        points = f"{100 * mean / (counted['params'] / 1e5):.2f}"
        rows.append(
            {"network": name, **counted, "test accuracy": mean_spread(found[name]), "points per 100k": points}
        )
    reason = (
        f"{rows[0]['test accuracy']} against {rows[1]['test accuracy']} "
        f"at {rows[0]['params']:,} and {rows[1]['params']:,} parameters"
    )
    verdict = judge(found[OURS], found[PLAIN], images)
    return Reproduction("simplenet", CLAIM, rows, verdict, reason, found, plan.setting())
