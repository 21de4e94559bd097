"""From a data set and a candidate to a trained network: pixels, augmentation and recipe put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.data.augment import Augment, augment_images, default_augment
from featherweight.data.preprocess import Preprocess
from featherweight.data.sources import Dataset, Split
from featherweight.train.batches import ArrayData
from featherweight.train.loop import TrainResult, fit_model
from featherweight.train.recipe import Recipe
from featherweight.workflows.candidates import Candidate

_STATISTICS_IMAGES = 2000
_KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class AugmentImages:
    """Augmentation of a batch in the form that the training loop calls; blending is the recipe's part."""

    config: Augment

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the varied images (N, C, H, W) and the labels as they were."""
        return augment_images(images, self.config, generator), labels


@dataclass(frozen=True)
class Task:
    """A data set made ready for training: what every candidate shares.

    Args:
        dataset: images and labels with their splits.
        mode: `"RGB"`, or `"L"` where every image is grey.
        mean: per-channel mean of the training pixels on the 0 to 1 scale.
        std: per-channel deviation, likewise.
        augment: how batches are varied.
    """

    dataset: Dataset
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentImages
    _decoded: dict[tuple[int, int], tuple[Split, ArrayData]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.dataset.classes)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return 1 if self.mode == "L" else 3

    def preprocess(self, side: int) -> Preprocess:
        """Return the preprocessing specification at an input side in pixels."""
        return Preprocess(size=(side, side), mean=self.mean, std=self.std, mode=self.mode)

    def arrays(self, split: Split, side: int) -> ArrayData:
        """Return the images of a split at an input side in pixels, with their labels.

        The latest ones are kept, since the trials of a search come back to the same few sides.
        """
        key = (id(split), side)
        if key not in self._decoded:
            pixels = torch.from_numpy(split.decode((side, side), self.mode))
            labels = torch.from_numpy(np.asarray(split.labels, dtype=np.int64))
            # The split goes along: while it lives, no other object takes its id.
            self._decoded[key] = split, ArrayData(pixels, labels, self.mean, self.std)
            self._drop_oldest(keep=key)
        return self._decoded[key][1]

    def _drop_oldest(self, keep: tuple[int, int]) -> None:
        for key in [key for key in self._decoded if key != keep]:
            if sum(data.images.nbytes for _, data in self._decoded.values()) <= _KEPT_BYTES:
                break
            del self._decoded[key]


def make_task(dataset: Dataset) -> Task:
    """Measure what the preprocessing needs on the training split and choose the augmentation."""
    mode = dataset.mode
    side = 32
    pixels = dataset.train.decode((side, side), mode)[:: max(1, len(dataset.train) // _STATISTICS_IMAGES)]
    scaled = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / 255
    mean = tuple(round(float(value), 4) for value in scaled.mean(axis=0))
    std = tuple(round(max(float(value), 0.02), 4) for value in scaled.std(axis=0))
    return Task(dataset, mode, mean, std, AugmentImages(default_augment(dataset)))


def make_recipe(candidate: Candidate, task: Task, **length: Any) -> Recipe:
    """Return the recipe of the candidate's card, fitted to the size of the data set.

    Args:
        candidate: the network.
        task: the data.
        **length: `epochs`, `time_budget_s`, `seed` and other fields of `Recipe`.
    """
    # Batches of at most a twentieth of the data keep enough steps in an epoch of a small set.
    largest = max(16, len(task.dataset.train) // 20)
    batch = min(128, 2 ** int(np.log2(largest)))
    config = task.augment.config
    mixing = {"mixup": config.mixup, "cutmix": config.cutmix}
    recipe = Recipe(**{"batch_size": batch, **mixing, **candidate.recipe(), **length})
    if "batch_size" in candidate.recipe() or "lr" in length:
        return recipe
    # Linear scaling of the learning rate with the batch for SGD, square root for AdamW.
    power = 1.0 if recipe.optimizer == "sgd" else 0.5
    return dataclasses.replace(recipe, lr=recipe.lr * (batch / 128) ** power)


def train_candidate(
    candidate: Candidate,
    task: Task,
    recipe: Recipe,
    out_dir: Path,
    *,
    resume: bool = False,
    teacher: nn.Module | None = None,
    pretrained: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **devices: Any,
) -> tuple[nn.Module, TrainResult]:
    """Train one candidate on the training split, validating on the validation split.

    Returns:
        The trained network in eval mode, and what the training went through.
    """
    torch.manual_seed(recipe.seed)
    model = candidate.build(task.num_classes, task.in_chans, pretrained=pretrained)
    result = fit_model(
        model,
        task.arrays(task.dataset.train, candidate.input),
        task.arrays(task.dataset.val, candidate.input),
        recipe,
        task.augment,
        out_dir,
        teacher=teacher,
        resume=resume,
        progress=progress,
        **devices,
    )
    return model.eval(), result
