"""What a data set is once loaded: classes, and three splits that decode to arrays on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featherweight.data.images import open_image
from featherweight.data.preprocess import resize_image
from featherweight.data.scan import run_chunks
from featherweight.data.store import ImageStore


@dataclass(frozen=True, eq=False)
class Split:
    """The images and labels of one part of a data set.

    Args:
        store: all images of the source.
        index: positions of this split's images in `store`.
        labels: class numbers, int64, one per image.
        pixels: the store's decoded images, where they fit into memory.
        rows: positions of this split's images in `pixels`.
    """

    store: ImageStore
    index: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | list[np.ndarray] | None
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def images(self) -> Sequence[Path | bytes | np.ndarray]:
        """The encoded items: each is what `open_image` accepts."""
        return _Items(self.store, self.index)

    def image(self, i: int) -> Image.Image:
        """Return image `i`, upright, as mode `"L"` or `"RGB"`, at its own size."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[int(self.rows[i])])
        return open_image(self.store[int(self.index[i])])

    def name(self, i: int) -> str:
        """Return the name of image `i`: its relative path, or its place in an array."""
        return self.store.name(int(self.index[i]))

    def decode(self, size: tuple[int, int], mode: str = "RGB", resize: str = "squash") -> np.ndarray:
        """Return all images as a new uint8 array (N, H, W, C), resized by the rule of `Preprocess.apply`.

        Args:
            size: height and width in pixels.
            mode: `"RGB"` or `"L"`.
            resize: see `Preprocess`.
        """
        channels = 3 if mode == "RGB" else 1
        out = np.empty((len(self), *size, channels), np.uint8)
        if self._is_ready(size, mode):
            out[:] = np.take(self.pixels, self.rows, axis=0).reshape(out.shape)
            return out

        def fill(low: int, high: int) -> None:
            for i in range(low, high):
                out[i] = resize_image(self.image(i), size, mode, resize)

        run_chunks(len(self), fill, "resizing images", chunk=64)
        return out

    def subset(self, rows: np.ndarray) -> Split:
        """Return the split that holds only these positions, in this order."""
        rows = np.asarray(rows)
        return Split(self.store, self.index[rows], self.labels[rows], self.pixels, self.rows[rows])

    def _is_ready(self, size: tuple[int, int], mode: str) -> bool:
        held = self.pixels
        return (
            isinstance(held, np.ndarray)
            and held.shape[1:3] == tuple(size)
            and ((held.ndim == 3) if mode == "L" else (held.ndim == 4))
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled set of images, cut in three.

    Args:
        name: of the folder, file or built-in set.
        classes: names, in the order of the labels.
        train: images to learn from.
        val: images to choose by.
        test: images to report on.
        mode: `"L"` if no image has colour, else `"RGB"`.
        skipped: (name, reason) of every image that could not be used.
        warnings: sentences for the user: leaks between splits, small classes.
        duplicates: exact duplicates of training images in val or test, and of val images in test.
        sizes: smallest, median and largest (height, width) in pixels.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mode: str
    skipped: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    duplicates: int
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

    def splits(self) -> Iterator[tuple[str, Split]]:
        """Yield the three splits with their names."""
        yield from (("train", self.train), ("val", self.val), ("test", self.test))

    def summary(self) -> dict[str, Any]:
        """Return what was found, as plain values that fit into JSON.

        Keys: name, classes, mode, images {train, val, test, total}, size_px {min, median, max} as
        [height, width], balance {class: {train, val, test}}, duplicates_across_splits, skipped, warnings.
        """
        images = {name: len(split) for name, split in self.splits()}
        counts = {
            name: np.bincount(split.labels, minlength=len(self.classes)) for name, split in self.splits()
        }
        return {
            "name": self.name,
            "classes": list(self.classes),
            "mode": self.mode,
            "images": {**images, "total": sum(images.values())},
            "size_px": {
                key: list(size) for key, size in zip(("min", "median", "max"), self.sizes, strict=True)
            },
            "balance": {
                label: {name: int(count[i]) for name, count in counts.items()}
                for i, label in enumerate(self.classes)
            },
            "duplicates_across_splits": self.duplicates,
            "skipped": len(self.skipped),
            "warnings": list(self.warnings),
        }


class _Items(Sequence):
    """The items of a store at some positions."""

    def __init__(self, store: ImageStore, index: np.ndarray) -> None:
        self._store, self._index = store, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Path | bytes | np.ndarray:
        return self._store[int(self._index[i])]
