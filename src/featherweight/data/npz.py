"""Read images from numpy archives; nothing is ever unpickled.

Layouts of one file: `x_train, y_train, x_test, y_test[, x_val, y_val]` (arrays); `data, offsets, labels`
(encoded image files one after the other); `x, y` or `images, labels` (arrays). `classes` names the labels.
`track`, `source` and `group` (alone or with `_train` and so on) tell which images belong together: tracks and
sources are numbered within their class, groups over the whole file.
A folder may hold train.npz, test.npz, val.npz.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from featherweight.data.folder import SPLIT_NAMES
from featherweight.data.images import to_uint8
from featherweight.data.store import ArrayStore, EncodedStore, ImageStore, RawData, RawPart, encode_labels
from featherweight.errors import DataError

MAX_BYTES = 16 << 30
_ARRAY_KEYS = (("x", "y"), ("images", "labels"))
_EXPECTED = "Expected x_train,y_train,x_test,y_test or data,offsets,labels or x,y or images,labels"


def read_npz(path: Path) -> RawData:
    """Read one archive.

    Raises:
        DataError: not an archive, pickled objects inside, unknown keys, wrong shapes, or pixels that
            are NaN or out of range.
    """
    arrays = _load(path)
    found: dict[str, tuple[ImageStore, np.ndarray, np.ndarray | None]] = {}
    if "x_train" in arrays:
        keys = {
            split: (f"x_{split}", f"y_{split}")
            for split in ("train", "val", "test")
            if f"x_{split}" in arrays
        }
        pixels = _as_pixels({split: arrays[x] for split, (x, _) in keys.items()}, path)
        for split, (_, y) in keys.items():
            found[split] = (
                ArrayStore(pixels[split], split),
                _labels(arrays, y, path),
                _groups(arrays, split),
            )
    else:
        found["train"] = (
            _single_store(arrays, path),
            _labels(arrays, _label_key(arrays), path),
            _groups(arrays, ""),
        )
    return _finish(path.stem, found, arrays.get("classes"), path)


def read_npz_folder(root: Path) -> RawData | None:
    """Read a folder of train.npz (and test.npz, val.npz), or of one .npz only; None if it is neither.

    Raises:
        DataError: as `read_npz`; or the files name different classes.
    """
    files = sorted(path for path in root.glob("*.npz") if not path.name.startswith("."))
    by_split = {SPLIT_NAMES[path.stem.lower()]: path for path in files if path.stem.lower() in SPLIT_NAMES}
    if "train" not in by_split:
        has_folders = any(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())
        return read_npz(files[0]) if len(files) == 1 and not has_folders else None
    found, classes = {}, None
    for split, path in by_split.items():
        arrays = _load(path)
        store = _single_store(arrays, path, split)
        found[split] = (store, _labels(arrays, _label_key(arrays), path), _groups(arrays, ""))
        names = arrays.get("classes")
        if classes is not None and names is not None and names.tolist() != classes.tolist():
            raise DataError(
                f"{path} names other classes than its neighbours. Expected the same list in each file."
            )
        classes = names if classes is None else classes
    return _finish(root.name, found, classes, root)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BYTES:
            raise DataError(
                f"{path} unpacks to {size / 1e9:.0f} GB. Expected at most {MAX_BYTES / 1e9:.0f} GB."
            )
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        pickled = "pickle" in str(error)
        what = "holds pickled objects, which are refused" if pickled else f"cannot be read as .npz: {error}"
        raise DataError(f"{path} {what}. Expected plain arrays written by numpy.savez.") from error


def _single_store(arrays: dict[str, np.ndarray], path: Path, prefix: str = "image") -> ImageStore:
    if {"data", "offsets"} <= arrays.keys():
        data, offsets = arrays["data"], arrays["offsets"]
        shapes_fit = data.ndim == 1 and offsets.ndim == 1 and len(offsets) > 1 and offsets.dtype.kind in "iu"
        if not shapes_fit or data.dtype != np.uint8:
            raise DataError(
                f"'data' or 'offsets' of {path} has the wrong shape or type. Expected uint8 and integers."
            )
        offsets = offsets.astype(np.int64)
        if offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) < 0).any():
            raise DataError(f"'offsets' of {path} do not rise from 0 to the length of 'data' ({len(data)}).")
        return EncodedStore(data, offsets, prefix)
    for image_key, label_key in _ARRAY_KEYS:
        if image_key in arrays and label_key in arrays:
            return ArrayStore(_as_pixels({"": arrays[image_key]}, path)[""], prefix)
    raise DataError(f"{path} holds the keys {', '.join(sorted(arrays)) or 'none'}. {_EXPECTED}.")


def _label_key(arrays: dict[str, np.ndarray]) -> str:
    return "labels" if "labels" in arrays else "y"


def _as_pixels(parts: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Return uint8 arrays (N, H, W[, C]); the range is judged over all parts, so that they scale alike."""
    moved = {}
    for split, pixels in parts.items():
        if pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4) and pixels.shape[1] in (1, 3, 4):
            pixels = pixels.transpose(0, 2, 3, 1)
        if (
            pixels.ndim not in (3, 4)
            or pixels.size == 0
            or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4))
        ):
            raise DataError(
                f"Images in {path} have the shape {pixels.shape}. Expected (N, H, W[, 1|3|4]), not empty."
            )
        moved[split] = pixels
    if len({pixels.dtype for pixels in moved.values()}) > 1:
        raise DataError(f"Images in {path} differ in type between splits. Expected one type.")
    if all(pixels.dtype == np.uint8 for pixels in moved.values()):
        return moved
    try:
        flat = to_uint8(np.concatenate([pixels.ravel() for pixels in moved.values()]))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    cuts = np.cumsum([pixels.size for pixels in moved.values()])[:-1]
    pieces = zip(moved.items(), np.split(flat, cuts), strict=True)
    return {split: piece.reshape(pixels.shape) for (split, pixels), piece in pieces}


def _labels(arrays: dict[str, np.ndarray], key: str, path: Path) -> np.ndarray:
    labels = arrays.get(key)
    if labels is None:
        raise DataError(f"{path} has no labels '{key}'. {_EXPECTED}.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1:
        raise DataError(
            f"Labels '{key}' of {path} have the shape {labels.shape}. Expected one class number per image."
        )
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise DataError(f"Labels '{key}' of {path} are NaN or fractions. Expected whole numbers or names.")
    if labels.dtype.kind in "fiub" and len(labels) and labels.min() < 0:
        raise DataError(f"Labels '{key}' of {path} include {labels.min()}. Expected numbers from 0.")
    return labels.astype(np.int64) if labels.dtype.kind in "fiub" else labels.astype(str)


def _groups(arrays: dict[str, np.ndarray], split: str) -> np.ndarray | None:
    for key in ("track", "source", "group"):
        groups = arrays.get(f"{key}_{split}" if split else key)
        if groups is not None and groups.ndim == 1 and groups.dtype.kind in "iu":
            labels = arrays[f"y_{split}" if split else _label_key(arrays)].ravel()
            if len(groups) != len(labels) or key == "group":
                return groups.astype(np.int64)
            pairs = np.stack([np.unique(labels, return_inverse=True)[1], groups.astype(np.int64)], axis=1)
            return np.unique(pairs, axis=0, return_inverse=True)[1].ravel()
    return None


def _finish(
    name: str,
    found: dict[str, tuple[ImageStore, np.ndarray, np.ndarray | None]],
    names: np.ndarray | None,
    path: Path,
) -> RawData:
    """Check lengths and bring the labels of all splits to one list of classes."""
    for split, (store, labels, groups) in found.items():
        if len(store) != len(labels) or (groups is not None and len(groups) != len(labels)):
            raise DataError(
                f"{path} has {len(store)} images but {len(labels)} labels in {split}. Expected as many."
            )
    together = np.concatenate([labels for _, labels, _ in found.values()])
    if names is None:
        classes, together = encode_labels([str(label) for label in together])
    elif together.dtype.kind == "i":
        classes = tuple(str(value) for value in names)
        if together.max() >= len(classes):
            raise DataError(f"{path} has the label {together.max()} but names {len(classes)} classes.")
    else:
        classes = tuple(str(value) for value in names)
        strange = sorted(set(together.tolist()) - set(classes))
        if strange:
            raise DataError(f"{path} has labels that 'classes' does not name: {', '.join(strange[:5])}.")
        together = np.array([classes.index(value) for value in together.tolist()], np.int64)
    cuts = np.cumsum([len(labels) for _, labels, _ in found.values()])[:-1]
    pieces = zip(found.items(), np.split(together, cuts), strict=True)
    return RawData(name, classes, {split: RawPart(s, piece, g) for (split, (s, _, g)), piece in pieces})
