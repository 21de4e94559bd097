"""Read a folder of images: one folder per class, with or without train, val and test folders above them."""

from __future__ import annotations

import os
from pathlib import Path

from featherweight.data.images import SUFFIXES
from featherweight.data.store import FileStore, RawData, RawPart, encode_labels
from featherweight.errors import DataError

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


def read_folder(root: Path) -> RawData:
    """Read `root`; hidden files and folders are ignored, files that are no images are listed as skipped.

    Raises:
        DataError: there are no class folders, no images, or only one class.
    """
    folders = _subfolders(root)
    if not folders:
        loose = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        found = f"{loose} images but no class folders" if loose else "nothing"
        raise DataError(f"Found {found} in {root}. Expected one folder per class, each holding its images.")
    split_folders = _split_folders(folders)
    if split_folders is None:
        split_folders = {"train": [root]}
    skipped: list[tuple[str, str]] = []
    found = {
        split: [item for top in tops for item in _class_files(top, root, skipped)]
        for split, tops in split_folders.items()
    }
    names = [name for items in found.values() for name, _ in items]
    if not names:
        extra = f" ({len(skipped)} other files)" if skipped else ""
        raise DataError(f"Found no images under {root}{extra}. Expected {', '.join(sorted(SUFFIXES))} files.")
    classes, labels = encode_labels(names)
    parts, start = {}, 0
    for split, items in found.items():
        end = start + len(items)
        parts[split] = RawPart(FileStore([path for _, path in items], root), labels[start:end])
        start = end
    empty = sorted(
        {folder.name for tops in split_folders.values() for top in tops for folder in _subfolders(top)}
    )
    empty = [name for name in empty if name not in classes]
    warnings = (f"Class folders without images are left out: {', '.join(empty)}.",) if empty else ()
    return RawData(
        root.name, classes, {k: p for k, p in parts.items() if len(p.labels)}, tuple(skipped), warnings
    )


def _subfolders(root: Path) -> list[Path]:
    return sorted(
        path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX"))
    )


def _split_folders(folders: list[Path]) -> dict[str, list[Path]] | None:
    """Return the split folders by split, or None if any folder has another name (then they are classes)."""
    splits: dict[str, list[Path]] = {}
    for folder in folders:
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None:
            return None
        splits.setdefault(split, []).append(folder)
    # Two folders called train and test that hold images, not folders, are two classes.
    return splits if "train" in splits and _subfolders(splits["train"][0]) else None


def _class_files(top: Path, root: Path, skipped: list[tuple[str, str]]) -> list[tuple[str, Path]]:
    """Return (class, file) for every image below the class folders of `top`, in order of path."""
    items = []
    for folder in _subfolders(top):
        for where, below, files in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(files):
                path = Path(where, name)
                if name.startswith(".") or name.lower() in _SYSTEM_FILES:
                    continue
                if path.suffix.lower() in SUFFIXES:
                    items.append((folder.name, path))
                else:
                    what = f"'{path.suffix}'" if path.suffix else "no suffix"
                    skipped.append(
                        (path.relative_to(root).as_posix(), f"not an image file by its name ({what})")
                    )
    return items
