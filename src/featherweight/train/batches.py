"""Training batches from images in memory; every batch is a pure function of (seed, step, rank).

Order, augmentation and dropout draw from streams seeded by the step, so a run's position is one number
and nothing about random generators needs storing to resume exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.augment import Augment as Mixing
from ..data.augment import mix_batch
from ..errors import DataError
from .distill import distillation_loss
from .losses import classification_loss
from .recipe import Recipe

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""`augment(images uint8 (N, C, H, W), labels (N,), generator) -> (images, targets)`; images come back as
uint8 or as floats on the same 0 to 255 scale, targets as indices (N,) or probabilities (N, K)."""


class BatchSource(Protocol):
    """What the loop asks of batches: that of any step, and its loss.

    Attributes:
        local_size: Images of a batch in one process.
        world: Number of processes.
        steps_per_epoch: Steps between two epoch ends.
        side: Longest side in pixels of a batch at full size.
    """

    local_size: int
    world: int
    steps_per_epoch: int
    side: int

    def get(self, step: int, size: int | None, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of `step` and reseed torch's global stream."""

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, teacher: nn.Module | None) -> Tensor:
        """Return the loss of one batch."""


class TrainingData(Protocol):
    """What the loop asks of training data."""

    def fingerprint(self) -> str:
        """Return a digest to recognise the same data and the same task on it."""

    def batches(
        self, recipe: Recipe, augment: Augment | None, model: nn.Module, rank: int, world: int
    ) -> BatchSource:
        """Return the batches of one of `world` processes."""


class ValidationData(Protocol):
    """What the loop asks of validation data other than `ArrayData`.

    Attributes:
        score_name: Name of the score in histories; more is better.
    """

    score_name: str

    def __len__(self) -> int:
        """Return the number of images."""

    def head(self, count: int) -> ValidationData:
        """Return the first images."""

    def score(self, model: nn.Module, *, bf16: bool = False) -> tuple[float, float]:
        """Return (score, loss) of the network in evaluation mode; its mode is put back."""


@dataclass(frozen=True)
class ArrayData:
    """Labelled images in memory.

    Attributes:
        images: uint8 tensor (N, H, W, C).
        labels: int64 tensor (N,).
        mean: Per-channel mean on the 0 to 1 scale.
        std: Per-channel deviation on the 0 to 1 scale.
    """

    images: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    score_name: ClassVar[str] = "val_accuracy"

    def __post_init__(self) -> None:
        """Check shapes and types.

        Raises:
            DataError: The tensors do not fit the description above.
        """
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            found = f"{self.images.dtype} {tuple(self.images.shape)}"
            raise DataError(f"Images are {found}; expected a uint8 tensor (N, H, W, C).")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            found = f"{self.labels.dtype} {tuple(self.labels.shape)}"
            raise DataError(f"Labels are {found}; expected int64 of length {len(self.images)}.")
        channels = self.images.shape[3]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise DataError(f"Expected {channels} means and {channels} positive deviations, one per channel.")

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a digest of size, labels and a sample of the pixels, to recognise the same data."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.labels.contiguous().numpy().tobytes())
        stride = max(1, len(self) // 64)
        digest.update(self.images[::stride].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def head(self, count: int) -> ArrayData:
        """Return the first `count` images."""
        return ArrayData(self.images[:count], self.labels[:count], self.mean, self.std)

    def batches(
        self, recipe: Recipe, augment: Augment | None, model: nn.Module, rank: int = 0, world: int = 1
    ) -> Batches:
        """Return the batches of one of `world` processes."""
        return Batches(self, recipe, augment, num_classes_of(model, self), rank=rank, world=world)


def num_classes_of(model: nn.Module, train: ArrayData) -> int:
    """Return the number of classes: the network's attribute, or else one more than the highest label."""
    return int(getattr(model, "num_classes", 0) or train.labels.max().item() + 1)


def stream_seed(*key: int | str) -> int:
    """Return a 63-bit seed for the random stream named by `key`.

    >>> stream_seed(0, "order", 1) != stream_seed(0, "order", 2)
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def epoch_order(labels: Tensor, seed: int, epoch: int, *, balanced: bool = False) -> Tensor:
    """Return the sample indices (N,) of one epoch: a permutation, or a class-balanced draw."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "order", epoch))
    if not balanced:
        return torch.randperm(len(labels), generator=generator)
    counts = torch.bincount(labels).clamp_min(1)
    weights = 1.0 / counts[labels].double()
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return float32 `(images / 255 - mean) / std` of pixels (N, C, H, W), keeping the memory layout."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift.view(1, -1, 1, 1), images.float(), scale)


class Batches:
    """Gives the normalised batch of any step to one of `world` processes.

    A global batch is `world * batch_size` consecutive entries of the epoch's order; process `rank` takes
    its slice. A last incomplete global batch is dropped, different images each epoch.
    """

    def __init__(
        self,
        data: ArrayData,
        recipe: Recipe,
        augment: Augment | None,
        num_classes: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(data) < world:
            raise DataError(f"{len(data)} training images for {world} processes; expected at least one each.")
        self.data, self.recipe, self.augment, self.num_classes = data, recipe, augment, num_classes
        self.rank, self.world = rank, world
        self.local_size = min(recipe.batch_size, len(data) // world)
        self.steps_per_epoch = len(data) // (self.local_size * world)
        self.side = max(data.images.shape[1:3])
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Return the sample indices of this process at `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            seed, balanced = self.recipe.seed, self.recipe.balanced
            self._order = epoch_order(self.data.labels, seed, epoch, balanced=balanced)
            self._epoch = epoch
        start = (position * self.world + self.rank) * self.local_size
        return self._order[start : start + self.local_size]

    def get(
        self, step: int, size: int | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Return (images float32 (N, C, H, W), targets) of `step`, and reseed torch's global stream.

        `size` resizes the images to that side in pixels.

        The gathered block is (N, H, W, C); its permuted view already is a channels-last batch, so no
        copy is spent on layout.
        """
        recipe, index = self.recipe, self.indices(step)
        torch.manual_seed(stream_seed(recipe.seed, "layers", step, self.rank))
        generator = torch.Generator().manual_seed(stream_seed(recipe.seed, "augment", step, self.rank))
        images = self.data.images.index_select(0, index).permute(0, 3, 1, 2)
        targets = self.data.labels.index_select(0, index)
        if self.augment is not None:
            images, targets = self.augment(images, targets, generator)
        images, targets = images.to(device), targets.to(device)
        images = normalise(images, self.data.mean, self.data.std)
        if size is not None:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        if recipe.mixup > 0 or recipe.cutmix > 0:
            mixing = Mixing(mixup=recipe.mixup, cutmix=recipe.cutmix)
            images, targets = mix_batch(images, targets, self.num_classes, mixing, generator)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout), targets

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor, teacher: nn.Module | None) -> Tensor:
        """Return the recipe's loss of one batch, with the teacher's part if there is one."""
        recipe, logits = self.recipe, model(images)
        loss = classification_loss(logits, targets, recipe.label_smoothing)
        if teacher is None:
            return loss
        with torch.no_grad():
            answers = teacher(images)
        soft = distillation_loss(logits, answers, recipe.distill_temperature)
        return (1 - recipe.distill_alpha) * loss + recipe.distill_alpha * soft
