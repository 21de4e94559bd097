"""Batches: order, slices of ranks, purity, normalisation, checks."""

import pytest
import torch
from tiny_training import digits, jitter

from featherweight.errors import DataError
from featherweight.train.batches import ArrayData, Batches, epoch_order
from featherweight.train.recipe import Recipe


def test_an_epoch_shows_every_image_once_and_ranks_share_the_global_batch():
    train, _ = digits(96)
    recipe = Recipe(epochs=1, batch_size=8)
    whole = Batches(train, Recipe(epochs=1, batch_size=16), None, 10)
    ranks = [Batches(train, recipe, None, 10, rank=rank, world=2) for rank in (0, 1)]
    assert whole.steps_per_epoch == ranks[0].steps_per_epoch == 6
    for step in (0, 5, 6, 13):
        parts = torch.cat([rank.indices(step) for rank in ranks])
        assert torch.equal(parts, whole.indices(step))
    seen = torch.cat([whole.indices(step) for step in range(6)])
    assert torch.equal(seen.sort().values, torch.arange(96))
    assert not torch.equal(whole.indices(0), whole.indices(6))


def test_a_batch_depends_on_its_step_alone():
    train, _ = digits(96)
    recipe = Recipe(epochs=1, batch_size=16, mixup=0.4, cutmix=1.0, image_schedule=((1.0, 6),))
    first, second = (Batches(train, recipe, jitter, 10) for _ in range(2))
    for step in range(5):
        first.get(step)
    torch.rand(7)
    for left, right in zip(first.get(3, 6), second.get(3, 6), strict=True):
        assert torch.equal(left, right)
    images, targets = second.get(3, 6)
    assert images.shape == (16, 1, 6, 6) and torch.allclose(targets.sum(1), torch.ones(16))


def test_batches_are_normalised_and_channels_last():
    images = torch.randint(0, 256, (10, 6, 5, 3), dtype=torch.uint8)
    data = ArrayData(images, torch.arange(10), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    batches = Batches(data, Recipe(epochs=1, batch_size=4), None, 10)
    batch, labels = batches.get(0)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    expected = (images[labels].permute(0, 3, 1, 2) / 255.0 - mean) / std
    torch.testing.assert_close(batch, expected, rtol=1e-5, atol=1e-6)


def test_balanced_order_draws_rare_classes_as_often():
    labels = torch.tensor([0] * 900 + [1] * 100)
    drawn = labels[epoch_order(labels, 0, 0, balanced=True)]
    assert 0.42 < drawn.float().mean() < 0.58


def test_array_data_says_what_it_found():
    with pytest.raises(DataError, match=r"torch.float32 \(2, 3\)"):
        ArrayData(torch.rand(2, 3), torch.zeros(2).long(), (0.5,), (0.5,))
    with pytest.raises(DataError, match="Labels"):
        ArrayData(torch.zeros(2, 3, 3, 1, dtype=torch.uint8), torch.zeros(3).long(), (0.5,), (0.5,))
