"""MobileMamba's claim in miniature: each half of the far branch earns its place, on CIFAR-10.

The paper's mixer (section 3.2) joins several fields of view: a selective scan over the whole map and a filter
of wavelet bands for the same far channels, beside a depthwise filter for the near ones. One small MobileMamba
is trained as it is, without the scan, and without the wavelets; everything else is equal. The claim holds if
the whole network beats both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.models.mobilemamba import MobileMamba
from featherweight.models.mobilemamba.far import FarBranch
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = "The selective scan and the wavelet filter of the far branch both add accuracy."
WHOLE, NO_SCAN, NO_WAVELET = "whole", "without scan", "without wavelets"
SIDE = 32


class Nothing(nn.Module):
    """Give zeros of the input's shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Forget the input."""
        return torch.zeros_like(x)


def build(without: str = "") -> nn.Module:
    """Build the small network; `without` names a half of every far branch to leave out."""
    net = MobileMamba(
        (48, 64, 96),
        (1, 1, 1),
        stem_stride=1,
        stem_strides=(2, 2, 1),
        num_classes=10,
        input_size=(3, SIDE, SIDE),
    )
    for module in net.modules():
        if without and isinstance(module, FarBranch):
            setattr(module, without, Nothing())
            # A scale of nothing would be counted and decayed, and do nothing.
            module.scale = module.scale if without == "wavelet" else None
    return net


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three networks for equal epochs and compare."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(500, 10_000),
        test_images=(500, 10_000),
        side=SIDE,
        epochs=8,
        optimizer="adamw",
        lr=3e-3,
        batch_size=128,
        weight_decay=0.05,
        label_smoothing=0.1,
    )
    builders: dict[str, Callable[[], nn.Module]] = {
        WHOLE: build,
        NO_SCAN: lambda: build("scan"),
        NO_WAVELET: lambda: build("wavelet"),
    }
    found, images = accuracies(builders, plan, data_root, progress)
    rows = [
        {"network": name, **sizes(make, (3, SIDE, SIDE)), "test accuracy": mean_spread(found[name])}
        for name, make in builders.items()
    ]
    parts = {name: judge(found[WHOLE], found[name], images) for name in (NO_SCAN, NO_WAVELET)}
    scores = {name: mean_spread(values) for name, values in found.items()}
    reason = f"{scores[WHOLE]} against " + " and ".join(
        f"{scores[name]} {name} ({verdict})" for name, verdict in parts.items()
    )
    verdict = overall(list(parts.values()))
    return Reproduction("mobilemamba", CLAIM, rows, verdict, reason, found, plan.setting())
