"""Read a CSV file with the header path,label and optionally split; paths are relative to the CSV's folder."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from featherweight.data.folder import SPLIT_NAMES
from featherweight.data.store import FileStore, RawData, RawPart, encode_labels
from featherweight.errors import DataError


def read_table(path: Path) -> RawData:
    """Read the images that a CSV file lists; rows whose file is missing end up among the skipped.

    Raises:
        DataError: not a CSV, a column is missing, a row has no label or an unknown split, or a path leaves
            the CSV's folder (the message names the row).
    """
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} lists no images. Expected rows of path,label below the header.")
    classes, labels = encode_labels([label for _, label, _ in rows])
    splits = np.array([split for _, _, split in rows])
    parts = {}
    for split in ("train", "val", "test"):
        chosen = np.flatnonzero(splits == split)
        if len(chosen):
            parts[split] = RawPart(FileStore([rows[i][0] for i in chosen], path.parent), labels[chosen])
    return RawData(path.stem, classes, parts)


def _rows(path: Path) -> list[tuple[Path, str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = {name.strip().lower(): name for name in reader.fieldnames or () if name}
            if not {"path", "label"} <= header.keys():
                found = ",".join(reader.fieldnames or ()) or "nothing"
                raise DataError(
                    f"The header of {path} is '{found[:80]}'. Expected path,label (and split if wanted)."
                )
            rows = [
                (reader.line_num, {key: (row[name] or "").strip() for key, name in header.items()})
                for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    root = path.parent.resolve()
    return [_row(line, row, path, root) for line, row in rows]


def _row(line: int, row: dict[str, str], path: Path, root: Path) -> tuple[Path, str, str]:
    where = f"Row {line} of {path}"
    if not row["path"] or not row["label"]:
        raise DataError(f"{where} lacks its {'label' if row['path'] else 'path'}. Expected path,label.")
    split = SPLIT_NAMES.get((row.get("split") or "train").lower())
    if split is None:
        raise DataError(f"{where} has the split '{row['split']}'. Expected train, val or test.")
    image = path.parent / row["path"].replace("\\", "/")
    try:
        # Resolved, so that neither '..' nor a symbolic link leads out of the folder.
        inside = image.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} has an unusable path: {error}.") from error
    if not inside:
        raise DataError(
            f"{where} points outside the folder of the CSV: '{row['path']}'. Move the image into {root}."
        )
    return image, row["label"], split
