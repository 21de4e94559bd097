"""Load a data set from whatever the user has: a folder, a CSV, an .npz, or the name of a built-in set."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from featherweight.data.builtin import BUILTIN_NAMES, read_builtin
from featherweight.data.checks import (
    check_classes,
    count_duplicates,
    duplicate_warnings,
    small_class_warnings,
)
from featherweight.data.dataset import Dataset, Split
from featherweight.data.folder import read_folder
from featherweight.data.npz import read_npz, read_npz_folder
from featherweight.data.scan import Scan, scan_store
from featherweight.data.splits import stratified_split
from featherweight.data.store import RawData, RawPart
from featherweight.data.table import read_table
from featherweight.errors import DataError, close_matches

_LOG = logging.getLogger("featherweight")

# More validation images tell little more about a network, but would be missed in training.
_VAL_IMAGES = 5_000
_VAL_IMAGES_PER_CLASS = 20


def load_dataset(
    spec: str | Path,
    data_root: str | Path | None = None,
    seed: int = 0,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
) -> Dataset:
    """Read, check and split a data set.

    Splits that the source gives are kept. A missing one is carved from training: stratified by class, by
    seed, with images that belong together (a group key of the source, or exact duplicates) on one side.

    Args:
        spec: a folder, a .csv, an .npz, or one of the built-in names.
        data_root: where the built-in sets lie, for work without a network.
        seed: of the split.
        val_fraction: share of the images for validation, if the source has no such split; no more than 5,000
            images, or 20 a class where that is more.
        test_fraction: share of the images for testing, if the source has no such split.

    Raises:
        DataError: missing, empty, unreadable or unsafe input, or only one class.
    """
    try:
        raw = _read(spec, None if data_root is None else Path(data_root).expanduser())
    except OSError as error:
        raise DataError(f"Cannot read '{spec}': {error.strerror or error}. Check its permissions.") from error
    if "train" not in raw.parts:
        raise DataError(f"'{raw.name}' has no training images. Expected a split named train.")
    scans = {split: scan_store(part.store) for split, part in raw.parts.items()}
    skipped = (*raw.skipped, *(entry for scan in scans.values() for entry in scan.skipped))
    labels = np.concatenate([part.labels[scans[split].readable] for split, part in raw.parts.items()])
    check_classes(raw.name, raw.classes, labels)
    rows = _carve(raw, scans, seed, val_fraction, test_fraction)
    splits = {
        split: _make_split(raw.parts[home], scans[home], index) for split, (home, index) in rows.items()
    }
    digests = {split: [scans[home].digests[i] for i in index] for split, (home, index) in rows.items()}
    duplicates = count_duplicates(digests)
    warnings = [
        *raw.warnings,
        *small_class_warnings(raw.classes, labels, splits["train"].labels),
        *duplicate_warnings(duplicates),
    ]
    if skipped:
        warnings.append(
            f"{len(skipped)} file(s) could not be used and are skipped; the first: {skipped[0][0]}."
        )
    for warning in warnings:
        _LOG.warning(warning)
    sizes = np.concatenate([scan.sizes for scan in scans.values()])
    return Dataset(
        name=raw.name,
        classes=raw.classes,
        **splits,
        mode="L" if all(scan.grey for scan in scans.values()) else "RGB",
        skipped=skipped,
        warnings=tuple(warnings),
        duplicates=sum(duplicates.values()),
        sizes=tuple(_size(statistic(sizes, axis=0)) for statistic in (np.min, np.median, np.max)),
    )


def _read(spec: str | Path, data_root: Path | None) -> RawData:
    text = os.fspath(spec)
    if text in BUILTIN_NAMES or text.replace("_", "-") in BUILTIN_NAMES:
        return read_builtin(text.replace("_", "-"), data_root)
    path = Path(text).expanduser()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(f"Not a usable path: {error}.") from error
    if not exists:
        raise DataError(_missing(path, text))
    path = path.resolve() if is_folder else path
    if is_folder:
        tables = [entry for entry in sorted(path.glob("*.csv")) if not entry.name.startswith(".")]
        has_folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())
        if len(tables) == 1 and not has_folders:
            return read_table(tables[0])
        return read_npz_folder(path) or read_folder(path)
    readers = {".csv": read_table, ".npz": read_npz}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path} is a '{path.suffix}' file. Expected a folder, a .csv, an .npz or a built-in name."
        )
    return readers[path.suffix.lower()](path)


def _missing(path: Path, text: str) -> str:
    known = list(BUILTIN_NAMES) if path.parent == Path() else []
    if path.parent.is_dir():
        known += [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    near = close_matches(path.name, known)
    return f"No data at '{text}'. Expected a folder, .csv, .npz or one of {', '.join(BUILTIN_NAMES)}.{near}"


def _carve(
    raw: RawData, scans: dict[str, Scan], seed: int, val_fraction: float, test_fraction: float
) -> dict[str, tuple[str, np.ndarray]]:
    """Return for each split the part that it comes from and its rows among the part's readable images."""
    rows = {split: (split, np.arange(len(scan.readable))) for split, scan in scans.items()}
    scan, part = scans["train"], raw.parts["train"]
    labels = part.labels[scan.readable]
    if part.groups is not None:
        groups = part.groups[scan.readable]
    else:
        groups = np.unique(np.array(scan.digests), return_inverse=True)[1] if len(labels) else labels
    kept = rows["train"][1]
    missing = {"test": test_fraction, "val": val_fraction}
    for number, split in enumerate(split for split in missing if split not in rows):
        # The second cut is of what the first one left, but its share is meant of the whole.
        wanted = missing[split] * len(labels)
        if split == "val":
            wanted = min(wanted, max(_VAL_IMAGES, _VAL_IMAGES_PER_CLASS * len(raw.classes)))
        fraction = wanted / max(len(kept), 1)
        stay, held = stratified_split(labels[kept], min(fraction, 0.9), seed + 7919 * number, groups[kept])
        rows[split], kept = ("train", kept[held]), kept[stay]
    rows["train"] = ("train", kept)
    for split, (_, index) in rows.items():
        if len(index) == 0:
            raise DataError(
                f"'{raw.name}' has too few images for a {split} split. Expected at least 3 of a class."
            )
    return {split: rows[split] for split in ("train", "val", "test")}


def _make_split(part: RawPart, scan: Scan, rows: np.ndarray) -> Split:
    index = scan.readable[rows]
    return Split(part.store, index, part.labels[index].astype(np.int64), scan.pixels, rows)


def _size(pair: np.ndarray) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])
