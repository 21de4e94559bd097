"""SugarcaneShuffleNet's claims in miniature: transfer to few photographs of leaves, and maps that explain.

The paper takes ShuffleNetV2 trained on ImageNet, freezes its first tensors and trains a regularised head of
two layers. Here a body of half width is trained on CIFAR-10, enlarged to 64 pixels, and moves with the
recipe of the authors' best trial to sugarcane leaves (165 photographs to train with, 55 to test) and apple
leaves (480 and 200). Its rival is the same network from random weights, trained as long. Both are tried with
two learning rates and the better one counts: better on the test images, for either.

The paper also shows by Grad-CAM that the network looks at the lesion. Nobody drew the lesions of these
leaves, so images are made in which a coloured blob alone decides the class: more than half of the heat must
lie inside it, and covering the hottest part must cost more of the class's score than covering the coldest.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import DataError
from featherweight.models.sugarcane_shufflenet import ShuffleNetV2, SugarcaneShuffleNet, freeze_fraction
from featherweight.report.gradcam import grad_cam
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = (
    "On few photographs of leaves, a body trained on other images, with its first tensors frozen and the "
    "two-layer head, beats the same network trained from scratch; and Grad-CAM shows what decides the class."
)
WIDTH, SIDE, FRACTION = 0.5, 96, 0.05
TARGETS = {"leaf_sugarcane": 3, "leaf_apple": 4}
"""Folder of the data and number of classes."""

MOVED, SCRATCH = "moved body", "from scratch"
RATES = (2.5e-4, 2.5e-3)
TRIAL = {
    "optimizer": "adamw",
    "weight_decay": 1.3e-4,
    "label_smoothing": 0.1756,
    "clip_norm": 1.289,
    "balanced": True,
    "batch_size": 32,
}
"""The best trial of the authors' log; its learning rate is the first of `RATES`."""

BLOB_SIDE, BLOB_RADIUS, COVER = 48, 12, 0.2
"""Side of the made images and radius of the blob, in pixels; part of the image that is covered."""


def source_plan(quick: bool, seed: int) -> Plan:
    """Return how the body is trained first."""
    return Plan(
        data="cifar10",
        train_images=256 if quick else 20_000,
        test_images=100 if quick else 5_000,
        side=64,
        epochs=1 if quick else 8,
        seeds=(seed,),
        recipe={"optimizer": "adamw", "lr": 4e-3, "weight_decay": 0.02},
    )


def train_body(
    plan: Plan, data_root: Path, progress: Callable[[str], None]
) -> tuple[ShuffleNetV2, list[float]]:
    """Train the network on other images; return it with its test accuracy there."""
    built: list[ShuffleNetV2] = []

    def build() -> nn.Module:
        built.append(ShuffleNetV2(width=WIDTH, num_classes=10))
        return built[-1]

    found, _ = accuracies({"source": build}, plan, data_root, progress)
    return built[0], found["source"]


def build(classes: int, source: ShuffleNetV2 | None = None) -> nn.Module:
    """Build the network, with the source's body and its first tensors frozen where there is a source."""
    model = SugarcaneShuffleNet(width=WIDTH, num_classes=classes)
    if source is not None:
        model.body.load_state_dict(source.body.state_dict())
        freeze_fraction(model, FRACTION)
    return model


def compare(
    plan: Plan, classes: int, source: ShuffleNetV2, data_root: Path, progress: Callable[[str], None]
) -> tuple[dict[str, list[float]], int]:
    """Train both networks on one target with each learning rate; return accuracies at the better rate."""
    builders = {MOVED: functools.partial(build, classes, source), SCRATCH: functools.partial(build, classes)}
    tries = []
    for rate in RATES:
        tried = replace(plan, recipe={**TRIAL, "lr": rate})
        found, images = accuracies(builders, tried, data_root, progress)
        tries.append(found)
    return {form: max((found[form] for found in tries), key=statistics.fmean) for form in builders}, images


def blobs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make noisy images with a red, green or blue blob: `(N, 3, S, S)`, classes `(N,)`, blobs `(N, S, S)`."""
    labels = torch.randint(0, 3, (count,), generator=generator)
    low, high = BLOB_RADIUS, BLOB_SIDE - BLOB_RADIUS
    centres = torch.randint(low, high, (count, 2, 1, 1), generator=generator)
    place = torch.arange(BLOB_SIDE)
    inside = (place[:, None] - centres[:, 0]) ** 2 + (place - centres[:, 1]) ** 2 <= BLOB_RADIUS**2
    images = torch.randn(count, 3, BLOB_SIDE, BLOB_SIDE, generator=generator)
    colours = 1.5 * F.one_hot(labels, 3).float()[:, :, None, None]
    return images + colours * inside[:, None], labels, inside


def small_network() -> nn.Module:
    """Build the network for three colours of blobs: a quarter of the width, a last map of 6 x 6."""
    return SugarcaneShuffleNet(width=0.25, stem_stride=1, num_classes=3)


def explain(seed: int, steps: int) -> dict[str, float]:
    """Train on blobs and look at the maps of 96 new ones.

    Returns:
        Accuracy; the part of the heat inside the blob; and by how much more the class's score falls when the
        hottest part of the image is covered than when the coldest is.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = small_network().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(steps):
        images, labels, _ = blobs(32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels, inside = blobs(96, generator)
    heat = torch.from_numpy(grad_cam(model.eval(), images, class_index=labels.tolist()))
    order = heat.flatten(1).argsort(1)
    part = int(COVER * order.shape[1])
    with torch.no_grad():
        whole, hot, cold = (
            model(cover(images, places)).gather(1, labels[:, None]).mean()
            for places in (order[:, :0], order[:, -part:], order[:, :part])
        )
        accuracy = (model(images).argmax(1) == labels).float().mean()
    share = (heat * inside).sum((1, 2)) / heat.sum((1, 2)).clamp(min=1e-6)
    return {
        "accuracy": float(accuracy),
        "heat inside": float(share.mean()),
        "loss by the hot part": float((whole - hot) - (whole - cold)),
    }


def cover(images: Tensor, places: Tensor) -> Tensor:
    """Set the pixels at flat `places` `(N, K)` of each image to the mean, 0."""
    kept = torch.ones(len(images), BLOB_SIDE**2).scatter(1, places, 0.0)
    return images * kept.view(-1, 1, BLOB_SIDE, BLOB_SIDE)


def above(values: list[float], limit: float) -> str:
    """Say whether every seed lies above the limit."""
    if min(values) > limit:
        return HOLDS
    return FAILS if max(values) < limit else OPEN


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the body, move it to both sets of leaves, and explain the blobs.

    Raises:
        DataError: the leaves are not in `data_root`.
    """
    if data_root is None or not all((data_root / name).is_dir() for name in TARGETS):
        raise DataError(f"This entry needs --data-root with the folders {' and '.join(TARGETS)}.")
    first = source_plan(quick, seed)
    source, source_accuracy = train_body(first, data_root, progress)
    plan = Plan(
        data=", ".join(TARGETS),
        train_images=48 if quick else 480,
        test_images=40 if quick else 200,
        side=SIDE,
        epochs=1 if quick else 15,
        seeds=(seed,) if quick else (seed, seed + 1, seed + 2),
        recipe=TRIAL,
    )
    measured, rows, verdicts = {"source": source_accuracy}, [], {}
    for name, classes in TARGETS.items():
        target = replace(plan, data=str(data_root / name))
        found, images = compare(target, classes, source, data_root, progress)
        verdicts[name] = judge(found[MOVED], found[SCRATCH], images)
        counted = sizes(functools.partial(build, classes), (3, SIDE, SIDE))
        for form, values in found.items():
            measured[f"{name}, {form}"] = values
            rows.append({"data": name, "network": form, **counted, "test accuracy": mean_spread(values)})
    seen = [explain(number, 10 if quick else 150) for number in plan.seeds]
    for what in seen[0]:
        measured[f"blobs, {what}"] = [values[what] for values in seen]
    verdicts["heat inside the blob"] = above(measured["blobs, heat inside"], 0.5)
    verdicts["hot against cold part covered"] = above(measured["blobs, loss by the hot part"], 0.0)
    counted = sizes(small_network, (3, BLOB_SIDE, BLOB_SIDE))
    accuracy = mean_spread(measured["blobs, accuracy"])
    rows.append({"data": "blobs", "network": SCRATCH, **counted, "test accuracy": accuracy})
    reason = "; ".join(f"{what}: {verdict}" for what, verdict in verdicts.items())
    reason += f"; heat inside the blob {mean_spread(measured['blobs, heat inside'])}"
    setting = {**plan.setting(), "rates": list(RATES), "source": first.setting()}
    verdict = overall(list(verdicts.values()))
    return Reproduction("sugarcane_shufflenet", CLAIM, rows, verdict, reason, measured, setting)
