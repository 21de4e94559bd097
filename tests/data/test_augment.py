"""Each augmentation against what it must do to known pixels; all of them against their generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featherweight.data.augment import (
    Augment,
    augment_images,
    crop_and_flip,
    cutout,
    default_augment,
    mix_batch,
    randaugment,
)
from featherweight.errors import UsageError

ALL = Augment(crop_pad=0.125, flip=True, randaugment_magnitude=9, cutout=0.25, mixup=0.2, cutmix=1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 32, side: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=seeded(9))


def test_every_crop_is_a_window_of_the_reflected_image() -> None:
    images = batch(64)
    out = crop_and_flip(images, 0.125, True, seeded()).numpy()
    seen = set()
    for image, got in zip(images.numpy(), out, strict=True):
        wide = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        windows = {
            (dy, dx, mirror): wide[:, dy : dy + 16, dx : dx + 16][..., :: -1 if mirror else 1]
            for dy in range(5)
            for dx in range(5)
            for mirror in (False, True)
        }
        match = [key for key, window in windows.items() if np.array_equal(window, got)]
        assert match
        seen.update(match)
    assert len(seen) > 25 and {key[2] for key in seen} == {False, True}


def test_without_flip_nothing_is_mirrored() -> None:
    images = batch()
    assert torch.equal(crop_and_flip(images, 0.0, False, seeded()), images)


def test_cutout_greys_one_clipped_square() -> None:
    images = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    changed = (cutout(images, 0.5, seeded()) == 128).all(1)
    for mask in changed.numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert len(rows) <= 8 and len(columns) <= 8 and mask.sum() == len(rows) * len(columns)
    assert changed.sum((1, 2)).max() == 64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_layouts_agree_and_type_is_kept(dtype: torch.dtype, channels: int) -> None:
    first = batch()[:, :channels].to(dtype)
    before = first.clone()
    out = augment_images(first, ALL, seeded())
    last = augment_images(first.permute(0, 2, 3, 1).contiguous(), ALL, seeded())
    assert out.dtype == dtype and torch.equal(out, last.permute(0, 3, 1, 2)) and torch.equal(first, before)
    assert not torch.equal(out, first)


def test_same_generator_state_gives_the_same_batch_and_leaves_torchs_own_alone() -> None:
    generator = seeded()
    augment_images(batch(), ALL, generator)
    state, outside = generator.get_state(), torch.get_rng_state()
    labels = torch.arange(32) % 4
    first = mix_batch(augment_images(batch(), ALL, generator), labels, 4, ALL, generator)
    torch.rand(7)
    torch.set_rng_state(outside)
    generator.set_state(state)
    again = mix_batch(augment_images(batch(), ALL, generator), labels, 4, ALL, generator)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(first[0], augment_images(batch(), ALL, generator))


def test_randaugment_changes_images_differently() -> None:
    images = batch(1).expand(64, -1, -1, -1)
    out = randaugment(images, 9, seeded())
    assert out.shape == images.shape and len(torch.unique(out.flatten(1), dim=0)) > 2


def test_mixup_blends_by_the_target() -> None:
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 100, 200)])
    for seed in range(20):
        mixed, targets = mix_batch(images, torch.arange(3), 3, Augment(mixup=1.0), seeded(seed))
        expected = (targets @ torch.tensor([0.0, 100.0, 200.0]))[:, None, None, None].expand(3, 3, 8, 8)
        torch.testing.assert_close(mixed.float(), expected, atol=0.51, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(3))


@pytest.mark.parametrize("last", [False, True])
def test_cutmix_target_is_the_area(last: bool) -> None:
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 100, 200)])
    images = images.permute(0, 2, 3, 1) if last else images
    for seed in range(20):
        mixed, targets = mix_batch(images, torch.arange(3), 3, Augment(cutmix=1.0), seeded(seed))
        shares = torch.stack([(mixed.flatten(1) == value).float().mean(1) for value in (0, 100, 200)], dim=1)
        torch.testing.assert_close(targets, shares)


def test_nothing_set_changes_nothing() -> None:
    images, labels = batch(), torch.arange(32) % 5
    assert torch.equal(augment_images(images, Augment(), seeded()), images)
    same, targets = mix_batch(images, labels, 5, Augment(), seeded())
    assert same is images and torch.equal(targets.argmax(1), labels)


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8), (3, 8, 8, 5)])
def test_shapes_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="shape"):
        augment_images(torch.zeros(shape), ALL, seeded())


@pytest.mark.parametrize(
    "bad",
    [
        {"crop_pad": -0.1},
        {"crop_pad": 0.6},
        {"cutout": 2},
        {"randaugment_magnitude": 31},
        {"mixup": float("nan")},
    ],
)
def test_values_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Augment(**bad)
    with pytest.raises(UsageError, match="no option"):
        Augment.from_dict({"rotate": 1})


def facts(name: str, classes: list[str], train: int = 50_000, side: int = 32) -> dict[str, object]:
    return {"name": name, "classes": classes, "images": {"train": train}, "size_px": {"median": [side, side]}}


@pytest.mark.parametrize(
    ("name", "classes", "flip"),
    [
        ("digits", ["0", "1"], False),
        ("mnist", ["zero", "one"], False),
        ("fashion_mnist", ["0", "1"], True),
        ("cifar10", ["cat", "dog"], True),
        ("gtsrb43", ["stop", "go"], False),
        ("my letters", ["alpha", "beta"], False),
        ("photos", ["A", "B"], False),
        ("roads", ["turn left", "turn_right"], False),
        ("bright things", ["brightness", "cleft"], True),
    ],
)
def test_flips_only_where_meaning_survives(name: str, classes: list[str], flip: bool) -> None:
    assert default_augment(facts(name, classes)).flip is flip


def test_small_sets_get_more() -> None:
    large, middle, small = (default_augment(facts("pets", ["cat", "dog"], n)) for n in (50_000, 5_000, 300))
    assert large.randaugment_magnitude == 0 < middle.randaugment_magnitude < small.randaugment_magnitude
    assert default_augment(facts("digits", ["0"], 1259, 8)) == Augment(crop_pad=0.125)
