"""Training on patches of pictures: random places, flips and turns, and the loss of a dense target.

Like `batches.py`, every batch is a pure function of (seed, step, rank), so that a run resumes exactly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data.pictures import Pictures
from ..errors import DataError, UsageError
from ..models.span.adapt import affinity_loss
from .batches import Augment, stream_seed
from .dense_losses import check_pixel_loss, frequency_loss, pixel_loss
from .recipe import Recipe

MAX_EPOCH_STEPS = 1000
"""Steps of an epoch, the papers' word for it, unless the pictures are covered earlier."""


@dataclass(frozen=True)
class Restoration:
    """What a restoration network is trained for.

    Attributes:
        patch: Side of a patch of the large pictures, in pixels, a multiple of the scale.
        loss: `"l1"`, `"l2"` or `"charbonnier"`.
        frequency_weight: Weight of the distance between spectra beside it.
        teacher_weight: Weight of the pixel loss against the teacher's image.
        affinity_weight: Weight of the distance between affinities; network and teacher must be `Supervised`.
        flips: Vary patches by flips and quarter turns.
    """

    patch: int = 96
    loss: str = "l1"
    frequency_weight: float = 0.0
    teacher_weight: float = 1.0
    affinity_weight: float = 0.0
    flips: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with.

        Raises:
            UsageError: A value is out of its range.
        """
        check_pixel_loss(self.loss)
        if self.patch < 1:
            raise UsageError(f"patch={self.patch}; expected at least 1 pixel.")
        for name, value in asdict(self).items():
            if name.endswith("_weight") and not 0 <= value < math.inf:
                raise UsageError(f"{name}={value}; expected 0 or more.")


@dataclass(frozen=True)
class PatchData:
    """Pictures as training data.

    Attributes:
        pictures: Large and small pictures.
        task: What to train for.
    """

    pictures: Pictures
    task: Restoration

    def __post_init__(self) -> None:
        """Check that patches fit.

        Raises:
            UsageError: The patch is no multiple of the scale.
            DataError: A picture is smaller than a patch.
        """
        if self.task.patch % self.pictures.scale:
            raise UsageError(f"patch={self.task.patch} is no multiple of the scale {self.pictures.scale}.")
        if min(min(picture.shape[:2]) for picture in self.pictures.high) < self.task.patch:
            raise DataError(f"A picture is smaller than the patch of {self.task.patch} pixels.")

    def __len__(self) -> int:
        return len(self.pictures)

    def fingerprint(self) -> str:
        """Return a digest of the pictures and the task."""
        return hashlib.sha256(f"{self.pictures.fingerprint()} {asdict(self.task)}".encode()).hexdigest()

    def batches(
        self, recipe: Recipe, augment: Augment | None, model: nn.Module, rank: int = 0, world: int = 1
    ) -> PatchBatches:
        """Return the batches of one of `world` processes."""
        if augment is not None:
            raise UsageError("Patches are varied by flips and turns only; leave augment out.")
        return PatchBatches(self, recipe, rank=rank, world=world)


class PatchBatches:
    """Gives the batch of any step to one of `world` processes; see `BatchSource`.

    A picture is drawn in proportion to its area, a place in it evenly. An epoch has as many patches as cover
    the pictures once, but at most `MAX_EPOCH_STEPS` steps.
    """

    def __init__(self, data: PatchData, recipe: Recipe, *, rank: int = 0, world: int = 1) -> None:
        self.data, self.recipe, self.rank, self.world = data, recipe, rank, world
        self.local_size, self.side = recipe.batch_size, data.task.patch
        areas = [picture.shape[0] * picture.shape[1] for picture in data.pictures.high]
        self.areas = torch.tensor(areas, dtype=torch.float64)
        patches = max(len(data), sum(areas) / self.side**2)
        steps = math.ceil(patches / (self.local_size * world))
        self.steps_per_epoch = max(1, min(MAX_EPOCH_STEPS, steps))

    def get(
        self, step: int, size: int | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return small and large patches (N, 3, h, w) of `step` from 0 to 1, and reseed torch's stream.

        `size` is another side of the large patches, in pixels, rounded to the scale.
        """
        recipe, scale = self.recipe, self.data.pictures.scale
        torch.manual_seed(stream_seed(recipe.seed, "layers", step, self.rank))
        generator = torch.Generator().manual_seed(stream_seed(recipe.seed, "patches", step, self.rank))
        side = max(1, (size or self.side) // scale)  # of the small patches
        chosen = torch.multinomial(self.areas, self.local_size, replacement=True, generator=generator)
        places = torch.rand(self.local_size, 2, generator=generator).numpy()
        turns = torch.randint(8, (self.local_size,), generator=generator).tolist()
        pairs = []
        for index, place, turn in zip(chosen.tolist(), places, turns, strict=True):
            pair = self._cut(index, place, side)
            pairs.append([_turned(patch, turn) for patch in pair] if self.data.task.flips else pair)
        low, high = (np.stack([pair[part] for pair in pairs]) for part in (0, 1))
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        images, truth = (
            torch.from_numpy(patches).permute(0, 3, 1, 2).to(device).float().div_(255)
            for patches in (low, high)
        )
        return images.contiguous(memory_format=layout), truth.contiguous(memory_format=layout)

    def _cut(self, index: int, place: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
        pictures, scale = self.data.pictures, self.data.pictures.scale
        low = pictures.low[index]
        row, column = (int(p * (length - side + 1)) for p, length in zip(place, low.shape, strict=False))
        low = low[row : row + side, column : column + side]
        rows, columns = (slice(start * scale, (start + side) * scale) for start in (row, column))
        return low, pictures.high[index][rows, columns]

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, teacher: nn.Module | None) -> Tensor:
        """Return the task's loss of one batch, with the teacher's parts if there is one."""
        task, answer = self.data.task, model(images)
        restored, maps = answer if isinstance(answer, tuple) else (answer, None)
        loss = pixel_loss(restored, targets, task.loss)
        if task.frequency_weight:
            loss = loss + task.frequency_weight * frequency_loss(restored, targets)
        if teacher is None:
            return loss
        with torch.no_grad():
            told = teacher(images)
        image, taught = told if isinstance(told, tuple) else (told, None)
        if task.teacher_weight:
            loss = loss + task.teacher_weight * pixel_loss(restored, image, task.loss)
        if task.affinity_weight:
            if maps is None or taught is None:
                raise UsageError("affinity_weight needs maps; wrap network and teacher in Supervised.")
            loss = loss + task.affinity_weight * affinity_loss(maps, taught)
        return loss


def _turned(patch: np.ndarray, turn: int) -> np.ndarray:
    """Return (H, W, C) in one of the eight positions of a square."""
    if turn & 1:
        patch = patch[:, ::-1]
    if turn & 2:
        patch = patch[::-1]
    return patch.swapaxes(0, 1) if turn & 4 else patch


RECIPES: Mapping[str, tuple[dict[str, object], dict[str, object]]] = {
    # Published: arXiv 1909.11856, section 4.1; HR patches of 192, Adam, halved every 200 of 1000 epochs.
    "imdn": (
        {
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "lr": 2e-4,
            "schedule": "halving",
            "halvings": 4,
            "warmup_fraction": 0.0,
            "batch_size": 16,
            "epochs": 1000.0,
            "ema_decay": None,
        },
        {"patch": 192, "loss": "l1"},
    ),
    # Unpublished but for the kind of loss: a cosine over 1000 epochs, with the spectrum beside the pixels.
    "cfsr": (
        {
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "lr": 5e-4,
            "schedule": "cosine",
            "warmup_fraction": 0.01,
            "final_lr_fraction": 1e-3,
            "batch_size": 32,
            "epochs": 1000.0,
            "ema_decay": 0.999,
            "ema_every": 1,
        },
        {"patch": 192, "loss": "l1", "frequency_weight": 0.05},
    ),
    # Unpublished: as for IMDN, with an average.
    "span": (
        {
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "lr": 5e-4,
            "schedule": "halving",
            "halvings": 4,
            "warmup_fraction": 0.01,
            "batch_size": 16,
            "epochs": 1000.0,
            "ema_decay": 0.999,
            "ema_every": 1,
        },
        {"patch": 192, "loss": "l1"},
    ),
    # Unpublished weights of the losses and length; the ranks are those of the official file.
    "dsclora": (
        {
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "lr": 2e-4,
            "schedule": "cosine",
            "warmup_fraction": 0.01,
            "batch_size": 16,
            "epochs": 100.0,
            "ema_decay": 0.999,
            "ema_every": 1,
        },
        {"patch": 192, "loss": "l1", "teacher_weight": 0.1, "affinity_weight": 0.01},
    ),
}
"""Name -> fields of `Recipe` and of `Restoration`: published schedules where there are any."""
