"""Hold out a share of a data set: stratified by class, seeded, groups kept whole."""

from __future__ import annotations

import numpy as np

from featherweight.errors import DataError


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices that stay and those that are held out, about `fraction` of each class.

    A class of two or more groups gives at least one group and keeps at least one; a lone group stays.

    Args:
        labels: one label per image.
        fraction: share of images to hold out, between 0 and 1.
        seed: the same seed gives the same split.
        groups: images with the same number are never separated; without it each image is its own group.

    Raises:
        DataError: the fraction is out of range.

    >>> kept, held = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, seed=0)
    >>> len(kept), len(held)
    (6, 2)
    """
    if not 0 < fraction < 1:
        raise DataError(f"A split fraction of {fraction} was asked for. Expected a number between 0 and 1.")
    labels = np.asarray(labels)
    groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
    held_groups: dict[int, bool] = {}
    for label in np.unique(labels):
        rng = np.random.default_rng([seed, int(label)])
        names, counts = np.unique(groups[labels == label], return_counts=True)
        _assign(names, counts, fraction, rng, held_groups)
    held = np.array([held_groups[group] for group in groups.tolist()], bool)
    return np.flatnonzero(~held), np.flatnonzero(held)


def _assign(
    names: np.ndarray,
    counts: np.ndarray,
    fraction: float,
    rng: np.random.Generator,
    held_groups: dict[int, bool],
) -> None:
    """Decide the groups of one class; groups that an earlier class decided stay where they are."""
    target = counts.sum() * fraction
    sizes = dict(zip(names.tolist(), counts.tolist(), strict=True))
    held = sum(size for name, size in sizes.items() if held_groups.get(name, False))
    kept = sum(size for name, size in sizes.items() if held_groups.get(name) is False)
    free = [name for name in rng.permutation(names).tolist() if name not in held_groups]
    for position, name in enumerate(free):
        last_to_keep = kept == 0 and position == len(free) - 1
        held_groups[name] = held + sizes[name] / 2 <= target and not last_to_keep
        held += sizes[name] if held_groups[name] else 0
        kept += 0 if held_groups[name] else sizes[name]
    if held == 0 and free and len(sizes) > 1:
        held_groups[min(free, key=sizes.__getitem__)] = True
