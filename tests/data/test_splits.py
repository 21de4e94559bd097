"""Stratification and groups, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from featherweight.data.splits import stratified_split
from featherweight.errors import DataError


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.3])
def test_each_class_gives_its_share(fraction: float) -> None:
    labels = np.repeat(np.arange(4), [100, 40, 7, 3])
    kept, held = stratified_split(labels, fraction, seed=3)
    assert sorted([*kept, *held]) == list(range(150))
    counts = np.bincount(labels[held], minlength=4)
    for count, size in zip(counts, (100, 40, 7, 3), strict=True):
        assert max(1, size * fraction - 1) <= count <= max(1, size * fraction + 1)


def test_seed_decides() -> None:
    labels = np.repeat(np.arange(3), 50)
    first, again, other = (stratified_split(labels, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_groups_stay_whole_and_shares_hold() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 90)
    groups = labels * 100 + rng.integers(0, 15, len(labels))
    kept, held = stratified_split(labels, 0.2, 0, groups)
    assert not set(groups[kept]) & set(groups[held])
    for count in np.bincount(labels[held], minlength=5):
        assert 9 <= count <= 27


def test_groups_across_classes_stay_whole() -> None:
    labels = np.tile([0, 1], 60)
    groups = np.arange(120) // 6
    kept, held = stratified_split(labels, 0.2, 0, groups)
    assert len(held) and not set(groups[kept]) & set(groups[held])


def test_lone_group_stays_in_training() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    kept, held = stratified_split(labels, 0.4, 0, np.array([7, 7, 7, 1, 2, 3]))
    assert set(kept) >= {0, 1, 2} and len(held) == 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="fraction"):
        stratified_split(np.array([0, 1]), fraction, 0)
