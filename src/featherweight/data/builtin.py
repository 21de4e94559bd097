"""Built-in data sets: digits comes with scikit-learn; the others are fetched by torchvision and cached."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data.npz import read_npz, read_npz_folder
from featherweight.data.store import ArrayStore, RawData, RawPart
from featherweight.errors import DataError
from featherweight.files import cache_folder

_DIGITS = tuple("0123456789")
_GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_VEHICLES_AND_ANIMALS = tuple(
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)
# name: (class in torchvision.datasets, folder of its layout, class names)
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST", _DIGITS),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST", _GARMENTS),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _VEHICLES_AND_ANIMALS),
}
BUILTIN_NAMES = ("digits", *_TORCHVISION)
_CONNECT_TIMEOUT_S = 20.0


def read_builtin(name: str, data_root: Path | None = None) -> RawData:
    """Read a built-in data set.

    Args:
        name: one of `BUILTIN_NAMES`.
        data_root: a folder to use instead of the network: torchvision's layout, or numpy archives (train.npz
            and test.npz, or one file) in the folder itself or in one below it that bears the set's name.

    Raises:
        DataError: the set is neither cached nor reachable, or `data_root` does not hold it.
    """
    if name == "digits":
        return _read_digits()
    if data_root is not None:
        return _read_local(name, data_root)
    return _read_torchvision(name, cache_folder("datasets"), download=not os.environ.get("HF_HUB_OFFLINE"))


def _read_digits() -> RawData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey levels run from 0 to 16.
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return RawData(
        "digits", _DIGITS, {"train": RawPart(ArrayStore(pixels, "digits"), digits.target.astype(np.int64))}
    )


def _read_local(name: str, root: Path) -> RawData:
    _, layout, classes = _TORCHVISION[name]
    if not root.is_dir():
        raise DataError(f"No folder {root}. Expected --data-root to hold {name}.")
    if (root / layout).is_dir():
        return _read_torchvision(name, root, download=False)
    for stem in (name, name.replace("-", "_"), name.replace("-", "")):
        for place in (root / f"{stem}.npz", root / stem):
            raw = read_npz(place) if place.is_file() else read_npz_folder(place) if place.is_dir() else None
            if raw is not None:
                return _rename(raw, name, classes)
    raw = read_npz_folder(root)
    if raw is None:
        raise DataError(
            f"Found no {name} in {root}. Expected torchvision's folder '{layout}', '{name}.npz', or "
            "train.npz and test.npz there."
        )
    return _rename(raw, name, classes)


def _rename(raw: RawData, name: str, classes: tuple[str, ...]) -> RawData:
    """Give an archive without class names those of the set."""
    if len(raw.classes) != len(classes):
        raise DataError(f"The archive for {name} holds {len(raw.classes)} classes. Expected {len(classes)}.")
    named = classes if raw.classes == _DIGITS else raw.classes
    return RawData(name, named, raw.parts, raw.skipped, raw.warnings)


def _read_torchvision(name: str, root: Path, download: bool) -> RawData:
    from torchvision import datasets

    kind, _, classes = _TORCHVISION[name]
    parts = {}
    for split in ("train", "test"):
        images = _open_torchvision(getattr(datasets, kind), name, root, split == "train", download)
        pixels, labels = np.asarray(images.data), np.asarray(images.targets, np.int64)
        parts[split] = RawPart(ArrayStore(pixels, split), labels)
    return RawData(name, classes, parts)


def _open_torchvision(kind: Any, name: str, root: Path, train: bool, download: bool) -> Any:
    timeout = socket.getdefaulttimeout()
    try:
        return kind(str(root), train=train, download=False)
    except (RuntimeError, OSError) as error:
        if not download:
            raise DataError(
                f"{name} is not complete in {root}: {error}. Pass --data-root with a folder that holds it."
            ) from error
    try:
        # torchvision reports on stdout, which belongs to results.
        socket.setdefaulttimeout(_CONNECT_TIMEOUT_S)
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            return kind(str(root), train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Cannot download {name} ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Pass --data-root with a folder that holds it."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
