"""Tiny data and networks for the training tests."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from featherweight.train.batches import ArrayData


def digits(count: int = 320) -> tuple[ArrayData, ArrayData]:
    """Return small training and validation parts of scikit-learn's digits."""
    bunch = load_digits()
    images = torch.tensor(bunch.images * 15.9).to(torch.uint8)[..., None]
    labels = torch.tensor(bunch.target).long()
    train = ArrayData(images[:count], labels[:count], (0.3,), (0.4,))
    return train, ArrayData(images[-200:], labels[-200:], (0.3,), (0.4,))


def tiny_net(norm: bool = True, dropout: float = 0.1) -> nn.Module:
    """Return a freshly seeded two-convolution classifier."""
    torch.manual_seed(0)
    middle = nn.BatchNorm2d(8) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        middle,
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def jitter(images, labels, generator):
    """Augment: shift brightness by a random amount per image."""
    shift = torch.randint(0, 40, (len(images), 1, 1, 1), generator=generator)
    return (images.int() + shift).clamp(0, 255).to(torch.uint8), labels
