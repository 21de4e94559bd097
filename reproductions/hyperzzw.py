"""HyperZ·Z·W's claim in miniature: hyper-kernels learn without residuals, beside a residual network.

The paper says that layers whose kernels span the whole map need neither residual connections nor attention,
train fast with few parameters, and that the local feedback error updates the slow nets. Three blocks of
Terminator read Fashion-MNIST at 16 pixels and are trained as published (Kar3, label smoothing, feedback
error); a residual network of as many parameters is trained as long with AdamW. What is asked: does Terminator
learn (over 60 % with every seed), does its feedback error fall, and does it beat the residual network?
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.resnet import ResNet
from featherweight.data.sources import Split, load_dataset
from featherweight.models.terminator import Terminator
from featherweight.train.kar import Kar
from featherweight.workflows.miniature import sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, Reproduction, judge, mean_spread, overall

CLAIM = (
    "Blocks of hyper-kernels learn without residual connections, their local feedback error falls, and they "
    "are more accurate than a residual network of as many parameters."
)
OURS, RESIDUAL = "Terminator, 3 blocks", "residual network"
SIDE, LEARNT = 16, 0.6
KAR_RATE, ADAM_RATE, SMOOTHING = 0.001215, 3e-3, 0.1


def terminator() -> Terminator:
    """Build three blocks for 16 pixels."""
    return Terminator(side=SIDE, depth=3, in_chans=1, num_classes=10)


def residual() -> nn.Module:
    """Build a residual network of nearly as many parameters."""
    return ResNet((1, 1, 1), widths=(26, 52, 104), large_images=False, in_chans=1, num_classes=10)


def tensors(split: Split, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, about -1 to 2, and their labels."""
    part = split.subset(np.arange(min(limit, len(split.labels))))
    pixels = torch.from_numpy(part.decode((SIDE, SIDE), "L")).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.29) / 0.33, torch.from_numpy(part.labels.astype(np.int64))


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, seed: int) -> tuple[float, float]:
    """Train a network, with its feedback error where it has one, and return that error before and after."""
    ours = isinstance(model, Terminator)
    optimizer: torch.optim.Optimizer = (
        Kar(model.parameters(), KAR_RATE) if ours else torch.optim.AdamW(model.parameters(), ADAM_RATE)
    )
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, KAR_RATE if ours else ADAM_RATE, steps, pct_start=0.08, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    errors: list[float] = []
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            mirror = int(torch.randint(0, 2, (1,), generator=generator))
            part = x[rows].flip(3) if mirror else x[rows]
            loss = F.cross_entropy(model(part), labels[rows], label_smoothing=SMOOTHING)
            if ours:
                error = model.feedback_error()
                errors.append(float(error.detach()))
                loss = loss + error
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return (errors[0], errors[-1]) if errors else (0.0, 0.0)


@torch.no_grad()
def score(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the accuracy, 0 to 1."""
    answers = torch.cat([model(part).argmax(1) for part in x.split(250)])
    return float((answers == labels).double().mean())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train both networks with every seed and compare."""
    images, epochs = (128, 1) if quick else (4_000, 6)
    seeds = (seed,) if quick else (seed, seed + 1, seed + 2)
    dataset = load_dataset("fashion-mnist", data_root=data_root)
    x, labels = tensors(dataset.train, images)
    test, answers = tensors(dataset.test, 250 if quick else 10_000)
    builders: dict[str, Callable[[], nn.Module]] = {OURS: terminator, RESIDUAL: residual}
    found: dict[str, list[float]] = {name: [] for name in builders}
    errors: list[tuple[float, float]] = []
    for one in seeds:
        for name, build in builders.items():
            torch.manual_seed(one)
            model = build()
            change = train(model, x, labels, epochs, one)
            found[name].append(score(model, test, answers))
            errors += [change] if name == OURS else []
            progress(
                f"seed {one}: {name} {found[name][-1]:.2%}, feedback error {change[0]:.4f} to {change[1]:.4f}"
            )
    rows = [
        {"network": name, **sizes(build, (1, SIDE, SIDE)), "test accuracy": mean_spread(found[name])}
        for name, build in builders.items()
    ]
    verdicts = [
        HOLDS if min(found[OURS]) > LEARNT else FAILS,
        HOLDS if all(after < before for before, after in errors) else FAILS,
        judge(found[OURS], found[RESIDUAL], len(test)),
    ]
    before, after = (fmean(values) for values in zip(*errors, strict=True))
    reason = (
        f"learns: {verdicts[0]}; feedback error {before:.4f} to {after:.4f}: {verdicts[1]}; "
        f"{rows[0]['test accuracy']} against {rows[1]['test accuracy']} of the other: {verdicts[2]}"
    )
    found |= {"feedback error before": [a for a, _ in errors], "feedback error after": [b for _, b in errors]}
    setting = {
        "data": "fashion-mnist",
        "train_images": len(x),
        "epochs": epochs,
        "seeds": list(seeds),
        "side": SIDE,
    }
    return Reproduction("hyperzzw", CLAIM, rows, overall(verdicts), reason, found, setting)
