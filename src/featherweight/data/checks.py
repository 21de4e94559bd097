"""Checks of a loaded data set: what makes it unusable is an error, what makes it doubtful a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featherweight.errors import DataError

FEW_IMAGES = 10
_NAMES_SHOWN = 5


def check_classes(name: str, classes: Sequence[str], labels: np.ndarray) -> None:
    """Refuse a data set that cannot be classified.

    Raises:
        DataError: no image is left, or all are of one class.
    """
    if len(labels) == 0:
        raise DataError(f"'{name}' holds no readable image. Expected at least two classes with images.")
    present = np.unique(labels)
    if len(present) < 2:
        only = classes[int(present[0])]
        raise DataError(f"'{name}' has only one class with images, '{only}'. Expected at least two classes.")


def small_class_warnings(classes: Sequence[str], labels: np.ndarray, train_labels: np.ndarray) -> list[str]:
    """Warn of classes with fewer than `FEW_IMAGES` images, and of those that training never shows."""
    counts = np.bincount(labels, minlength=len(classes))
    warnings = []
    few = [f"{classes[i]} ({counts[i]})" for i in np.flatnonzero(counts < FEW_IMAGES)]
    if few:
        warnings.append(f"{len(few)} class(es) have fewer than {FEW_IMAGES} images: {_shorten(few)}.")
    shown = np.bincount(train_labels, minlength=len(classes))
    unseen = [classes[i] for i in np.flatnonzero((shown == 0) & (counts > 0))]
    if unseen:
        warnings.append(f"{len(unseen)} class(es) have no training image: {_shorten(unseen)}.")
    return warnings


def count_duplicates(digests: Mapping[str, Sequence[bytes]]) -> dict[tuple[str, str], int]:
    """Count the images of a later split whose exact pixels are also in an earlier one.

    >>> count_duplicates({"train": [b"a", b"b"], "val": [b"c"], "test": [b"a", b"a", b"c"]})
    {('train', 'test'): 2, ('val', 'test'): 1}
    """
    order = [split for split in ("train", "val", "test") if split in digests]
    found = {}
    for position, later in enumerate(order):
        for earlier in order[:position]:
            known = set(digests[earlier])
            count = sum(digest in known for digest in digests[later])
            if count:
                found[earlier, later] = count
    return found


def duplicate_warnings(found: Mapping[tuple[str, str], int]) -> list[str]:
    """Say how many images leak between which splits."""
    return [
        f"{count} image(s) of {later} are exact duplicates of {earlier} images: accuracy there is flattered."
        for (earlier, later), count in found.items()
    ]


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
