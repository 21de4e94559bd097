"""Batched augmentation on the CPU; every random choice comes from one generator, so a resumed run repeats it.

Images are uint8 or float tensors of shape (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, and come back in
the layout and type they had. Lengths are shares of the image's side, so one configuration fits every size.
RandAugment (arXiv:1909.13719) is torchvision's; mixup is arXiv:1710.09412, CutMix arXiv:1905.04899 and cutout
arXiv:1708.04552.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import UsageError

_GROUP = 16  # images that share one draw of RandAugment operations
_MAX_MAGNITUDE = 30
_SMALL_SIDE = 16
_NO_FLIP = re.compile(r"digit|mnist|char|letter|sign|gtsrb|svhn|font|text|plate|arrow|symbol", re.IGNORECASE)
_SIDED = re.compile(r"(^|[^a-z])(left|right)([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Augment:
    """Which augmentations to apply, and how strongly; the defaults apply none.

    Args:
        crop_pad: random crop after reflecting the border by this share of the side, in [0, 0.5].
        flip: mirror half of the images left to right.
        randaugment_magnitude: of two random operations per image, 1 to 30; 0 applies none.
        cutout: side of a grey square put at a random place, as a share of the image's side, in [0, 1].
        mixup: both parameters of the Beta distribution of the blend; 0 never blends.
        cutmix: both parameters of the Beta distribution of the pasted area; 0 never pastes.

    Raises:
        UsageError: a value is out of range.

    >>> Augment.from_dict(Augment(flip=True).to_dict()) == Augment(flip=True)
    True
    """

    crop_pad: float = 0.0
    flip: bool = False
    randaugment_magnitude: int = 0
    cutout: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        limits = {"crop_pad": 0.5, "randaugment_magnitude": _MAX_MAGNITUDE, "cutout": 1.0}
        for name in ("crop_pad", "randaugment_magnitude", "cutout", "mixup", "cutmix"):
            value, limit = getattr(self, name), limits.get(name, float("inf"))
            if not 0 <= value <= limit:
                raise UsageError(f"Augment {name} is {value}. Expected a number from 0 to {limit:g}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that fit into JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Augment:
        """Read a configuration back.

        Raises:
            UsageError: a name is unknown or a value out of range.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UsageError(f"Augment has no option {', '.join(sorted(unknown))}.")
        return cls(**values)


def default_augment(summary: Any) -> Augment:
    """Choose the augmentation for a data set from its `Dataset` or the dictionary of `Dataset.summary()`.

    Mirroring is left out where it may change the meaning: the set's name speaks of digits, characters or
    signs; a class is a single letter or number; a class name says left or right. Fashion-MNIST is mirrored.
    The fewer the training images, the stronger the rest; images under 16 pixels only move a little.
    """
    facts = summary.summary() if hasattr(summary, "summary") else summary
    name, classes, count = str(facts["name"]), list(facts["classes"]), int(facts["images"]["train"])
    flip = _may_flip(name, classes)
    if min(facts["size_px"]["median"]) < _SMALL_SIDE:
        return Augment(crop_pad=0.125, flip=flip)
    if count >= 20_000:
        return Augment(crop_pad=0.125, flip=flip)
    if count >= 2_000:
        return Augment(crop_pad=0.125, flip=flip, randaugment_magnitude=5, cutout=0.25)
    return Augment(crop_pad=0.125, flip=flip, randaugment_magnitude=9, cutout=0.25, mixup=0.2)


def augment_images(images: Tensor, config: Augment, generator: torch.Generator) -> Tensor:
    """Return a batch with everything of `config` applied that leaves the labels alone.

    Order: RandAugment (uint8 only), crop, flip, cutout. The input is not changed.

    Raises:
        UsageError: the shape is neither (N, C, H, W) nor (N, H, W, C) with 1 or 3 channels.
    """
    channels_last = _is_channels_last(images)
    x = images.permute(0, 3, 1, 2) if channels_last else images
    if config.randaugment_magnitude and x.dtype == torch.uint8:
        x = randaugment(x, config.randaugment_magnitude, generator)
    if config.crop_pad or config.flip:
        x = crop_and_flip(x, config.crop_pad, config.flip, generator)
    if config.cutout:
        x = cutout(x, config.cutout, generator)
    return x.permute(0, 2, 3, 1) if channels_last else x


def crop_and_flip(images: Tensor, pad: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image (N, C, H, W) by up to `pad` of its side, reflecting; mirror half if `flip`."""
    count, _, height, width = images.shape
    rows = _shifted(height, pad, count, generator)
    columns = _shifted(width, pad, count, generator)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    last = images.permute(0, 2, 3, 1)
    index = torch.arange(count)[:, None, None]
    return last[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Put a grey square of `share` of the side at a random centre of each image (N, C, H, W)."""
    count, _, height, width = images.shape
    inside = _box(count, height, width, torch.full((count,), share), generator)
    grey = 128 if images.dtype == torch.uint8 else images.mean()
    return torch.where(inside[:, None], torch.as_tensor(grey, dtype=images.dtype), images)


def randaugment(images: Tensor, magnitude: int, generator: torch.Generator) -> Tensor:
    """Apply two random RandAugment operations to uint8 images (N, C, H, W), in groups that share the draw."""
    from torchvision.transforms import InterpolationMode, v2

    change = v2.RandAugment(2, magnitude, interpolation=InterpolationMode.BILINEAR, fill=128)
    order = torch.randperm(len(images), generator=generator)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    # torchvision draws from the global generator: seed it from ours, then put it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for group in order.split(_GROUP):
            out[group] = change(images[group].contiguous())
    return out


def mix_batch(
    images: Tensor, labels: Tensor, num_classes: int, config: Augment, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blend each image with another of the batch; the targets become shares of the classes.

    If both mixup and cutmix are set, each batch takes one of them at random; if neither is, the images stay.

    Args:
        images: (N, C, H, W) or (N, H, W, C).
        labels: class numbers (N,) or shares (N, K).
        num_classes: K.
        config: what to mix.
        generator: of all random choices.

    Returns:
        The images, and float32 targets of shape (N, K) whose rows sum to 1.
    """
    targets = functional.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels.float()
    if not (config.mixup or config.cutmix):
        return images, targets
    paste = bool(config.cutmix) and (not config.mixup or bool(torch.rand(1, generator=generator) < 0.5))
    order = torch.randperm(len(images), generator=generator)
    kept = _beta(config.cutmix if paste else config.mixup, generator)
    if paste:
        images, kept = _paste(images, order, kept, generator)
    else:
        mixed = images.float().lerp(images[order].float(), 1 - kept)
        images = mixed.round_().to(images.dtype) if images.dtype == torch.uint8 else mixed.to(images.dtype)
    return images, targets * kept + targets[order] * (1 - kept)


def _paste(images: Tensor, order: Tensor, kept: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Paste one box, the same for all, from the images in `order`; return also the share really kept."""
    channels_last = _is_channels_last(images)
    height, width = images.shape[1:3] if channels_last else images.shape[2:4]
    inside = _box(1, height, width, torch.tensor([(1 - kept) ** 0.5]), generator)[0]
    mask = inside[None, :, :, None] if channels_last else inside[None, None]
    return torch.where(mask, images[order], images), 1 - inside.float().mean().item()


def _shifted(side: int, pad: float, count: int, generator: torch.Generator) -> Tensor:
    """Return source positions (count, side) of a random shift of up to `pad`, reflected at the ends."""
    reach = min(round(side * pad), side - 1)
    shift = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    place = (torch.arange(side) + shift).abs()
    return (side - 1) - ((side - 1) - place).abs()


def _box(count: int, height: int, width: int, share: Tensor, generator: torch.Generator) -> Tensor:
    """Return masks (count, height, width) of boxes of `share` of each side, centred anywhere, clipped."""
    masks = []
    for side in (height, width):
        half = (share * side / 2)[:, None]
        centre = torch.rand(count, 1, generator=generator) * side
        middle = torch.arange(side) + 0.5
        masks.append((middle - centre).abs() < half)
    return masks[0][:, :, None] & masks[1][:, None, :]


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha); numpy draws, since torch's Beta takes no generator."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _is_channels_last(images: Tensor) -> bool:
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return False
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return True
    raise UsageError(
        f"A batch has the shape {tuple(images.shape)}. Expected (N, 1|3, H, W) or (N, H, W, 1|3)."
    )


def _may_flip(name: str, classes: list[str]) -> bool:
    if "fashion" in name.lower():
        return True
    labels_say_no = any(len(label) == 1 or label.isdigit() or _SIDED.search(label) for label in classes)
    return not (_NO_FLIP.search(name) or labels_say_no)
