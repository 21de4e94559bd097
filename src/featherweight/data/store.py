"""Where images lie before they are decoded: files, encoded bytes in one array, or pixels in one array.

A reader (`folder`, `table`, `npz`, `builtin`) hands on `RawData`: for each split that the source gives, a
store with its labels. Items of a store are what `featherweight.data.images.open_image` accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np


class ImageStore(Protocol):
    """A sequence of encoded images, each with a name to show."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Path | bytes | np.ndarray: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True, eq=False)
class FileStore:
    """Image files; only their paths are held."""

    paths: Sequence[Path]
    root: Path

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Path:
        return self.paths[index]

    def name(self, index: int) -> str:
        """Return the path relative to the data set's folder, with forward slashes."""
        path = self.paths[index]
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.as_posix()


@dataclass(frozen=True, eq=False)
class EncodedStore:
    """Image files one after the other in one uint8 array; item i is `data[offsets[i]:offsets[i + 1]]`."""

    data: np.ndarray
    offsets: np.ndarray
    prefix: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def name(self, index: int) -> str:
        """Return `prefix/index`."""
        return f"{self.prefix}/{index:06d}"


@dataclass(frozen=True, eq=False)
class ArrayStore:
    """Decoded images of one size: uint8 of shape (N, H, W) or (N, H, W, C)."""

    pixels: np.ndarray
    prefix: str

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[index]

    def name(self, index: int) -> str:
        """Return `prefix/index`."""
        return f"{self.prefix}/{index:06d}"


@dataclass(frozen=True, eq=False)
class RawPart:
    """One split as read: images, labels and, where the source tells, which images belong together."""

    store: ImageStore
    labels: np.ndarray
    groups: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class RawData:
    """A source as read; `parts` has `"train"`, and `"val"` and `"test"` where the source gives them."""

    name: str
    classes: tuple[str, ...]
    parts: dict[str, RawPart]
    skipped: tuple[tuple[str, str], ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())


def encode_labels(values: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the class names in order (by number if all are whole numbers, else by text) and int64 labels.

    >>> encode_labels(["10", "9", "10"])[0]
    ('9', '10')
    """
    names = set(values)
    numeric = all(name.isascii() and name.isdigit() for name in names)
    classes = tuple(sorted(names, key=lambda name: (int(name), name) if numeric else (0, name)))
    position = {name: index for index, name in enumerate(classes)}
    return classes, np.array([position[value] for value in values], np.int64)
