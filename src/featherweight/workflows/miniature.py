"""What the miniatures of claims share: a subset of a data set, a short training, the test accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.data.augment import Augment, augment_images
from featherweight.data.sources import Split, load_dataset
from featherweight.measure.count import count
from featherweight.train.batches import ArrayData
from featherweight.train.loop import evaluate, fit_model
from featherweight.train.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """How large a miniature is.

    Args:
        data: name of the data set.
        train_images: at most this many training images, balanced over the classes.
        test_images: at most this many test images, likewise.
        side: of the images, in pixels.
        epochs: passes over the training images, the same for every configuration.
        seeds: each configuration is trained once with each.
        recipe: further fields of `Recipe`.
    """

    data: str
    train_images: int
    test_images: int
    side: int
    epochs: int
    seeds: tuple[int, ...]
    recipe: dict[str, Any]

    @classmethod
    def sized(
        cls,
        quick: bool,
        seed: int,
        *,
        data: str,
        train_images: tuple[int, int],
        test_images: tuple[int, int],
        epochs: int,
        side: int = 32,
        **recipe: Any,
    ) -> Plan:
        """Plan a full run with three seeds, or a quick one: an epoch with one seed.

        Args:
            quick: take the first of each pair of sizes.
            seed: the first seed.
            data: name of the data set.
            train_images: at most so many, quick and full.
            test_images: likewise.
            epochs: of the full run.
            side: of the images, in pixels.
            **recipe: further fields of `Recipe`.
        """
        return cls(
            data=data,
            train_images=train_images[not quick],
            test_images=test_images[not quick],
            side=side,
            epochs=1 if quick else epochs,
            seeds=(seed,) if quick else (seed, seed + 1, seed + 2),
            recipe=recipe,
        )

    def setting(self) -> dict[str, Any]:
        """Return plain values for the record."""
        return {**self.__dict__, "seeds": list(self.seeds)}


def accuracies(
    builders: dict[str, Callable[[], nn.Module]],
    plan: Plan,
    data_root: Path | None,
    progress: Callable[[str], None],
    inspect: Callable[[str, nn.Module, ArrayData], None] | None = None,
) -> tuple[dict[str, list[float]], int]:
    """Train every configuration with every seed, on the same images in the same order.

    Args:
        builders: configuration -> function that builds its network.
        plan: data, length and seeds.
        data_root: folder of the data sets.
        progress: called with a line after each training.
        inspect: called with each configuration's name, trained network and the test images.

    Returns:
        Configuration -> test accuracies (0 to 1), one per seed; and the number of test images.

    Raises:
        DataError: the data set is not there.
    """
    dataset = load_dataset(plan.data, data_root=data_root)
    train = _arrays(dataset.train, plan.train_images, plan.side, dataset.mode)
    test = replace(
        _arrays(dataset.test, plan.test_images, plan.side, dataset.mode), mean=train.mean, std=train.std
    )
    config = Augment(crop_pad=0.125, flip=True)
    found: dict[str, list[float]] = {name: [] for name in builders}
    for seed in plan.seeds:
        recipe = Recipe(**{"epochs": plan.epochs, "seed": seed, "ema_decay": None, **plan.recipe})
        for name, build in builders.items():
            torch.manual_seed(seed)
            model = build()
            with tempfile.TemporaryDirectory() as folder:
                fit_model(
                    model, train, replace_rows(test, 0), recipe, _augment(config), folder, progress=_silent
                )
            logits = evaluate(model, test)
            found[name].append(float((logits.argmax(1) == test.labels.numpy()).mean()))
            progress(f"seed {seed}: {name} {found[name][-1]:.2%}")
            if inspect:
                inspect(name, model, test)
    return found, len(test)


def sizes(build: Callable[[], nn.Module], input_size: tuple[int, int, int]) -> dict[str, int]:
    """Return parameters and MACs of a configuration."""
    counted = count(build().eval(), input_size)
    return {"params": counted.params, "macs": counted.macs}


def replace_rows(data: ArrayData, rows: int) -> ArrayData:
    """Return the first `rows` images."""
    return replace(data, images=data.images[:rows], labels=data.labels[:rows])


def _augment(config: Augment) -> Callable[..., Any]:
    def apply(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> tuple[Any, Any]:
        return augment_images(images, config, generator), labels

    return apply


def _silent(event: dict[str, Any]) -> None:
    """Swallow the events of a short training."""


def _arrays(split: Split, limit: int, side: int, mode: str) -> ArrayData:
    labels = np.asarray(split.labels)
    # The k-th image of each class before the (k + 1)-th of any: every prefix is balanced.
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    chosen = np.sort(np.lexsort((labels, rank))[:limit])
    part = split.subset(chosen)
    pixels = part.decode((side, side), mode)
    scaled = pixels[:2000].reshape(-1, pixels.shape[-1]) / 255
    return ArrayData(
        torch.from_numpy(pixels),
        torch.from_numpy(part.labels.astype(np.int64)),
        tuple(float(value) for value in scaled.mean(0)),
        tuple(float(value) for value in scaled.std(0)),
    )
