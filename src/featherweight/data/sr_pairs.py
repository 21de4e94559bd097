"""Find the pictures of a super-resolution test set, in a folder or a zip file, and pair small with large.

Known layouts: `NAME_HR.png` beside `NAME_LR.png` (SelfExSR, with a folder for each scale), folders `HR` and
`LRx4` (or `LR`, `LR_bicubic/X4`, `GTmod12`), and large pictures alone, whose small ones the caller makes.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from featherweight.data.images import SUFFIXES
from featherweight.data.photos import read_photo
from featherweight.errors import DataError

NAMED = ("set5", "bsd100")
"""Sets that may be given by name together with the folder that holds them."""

_LOW_FOLDER = re.compile(r"^(LR.*|X\d|low.*)$", re.IGNORECASE)
_SCALE = re.compile(r"^(?:.*[^a-z0-9])?(?:LR)?(?:bic)?x(\d)$", re.IGNORECASE)
_ENDING = re.compile(r"(?:[_-]?(?:HR|LR|GT))?(?:[_-]?x\d)?$|[_-](?:HR|LR|GT)$", re.IGNORECASE)


@dataclass(frozen=True)
class SRPair:
    """One picture of a test set: its name, the large one, and the small one where the set brings it.

    Both are of shape (H, W, 1 or 3), uint8 or uint16.
    """

    name: str
    high: np.ndarray
    low: np.ndarray | None


def find_sr_set(data: str | Path, data_root: str | Path | None = None) -> Path:
    """Return the folder or zip file of a test set.

    Args:
        data: a folder of pictures, a zip file, a folder with one zip file and no pictures, or a name.
        data_root: folder in which a name is looked up.

    Raises:
        DataError: there is nothing.
    """
    places = [Path(data)]
    if str(data).lower() in NAMED and data_root is not None:
        places.insert(0, Path(data_root) / str(data).lower())
    for place in places:
        if place.is_file() and place.suffix.lower() == ".zip":
            return place
        if place.is_dir():
            archives = sorted(place.glob("*.zip"))
            return archives[0] if len(archives) == 1 and not any(_pictures(place)) else place
    hint = f" A set's name ({', '.join(NAMED)}) needs --data-root." if str(data).lower() in NAMED else ""
    raise DataError(f"No test set at {data}. Expected a folder of pictures or a zip file.{hint}")


def sr_pairs(path: Path, scale: int) -> Iterator[SRPair]:
    """Yield the pictures of a set for one scale, by name.

    Raises:
        DataError: no picture for this scale, or one is missing, unreadable or of the wrong size.
    """
    with _opened(path) as (names, read):
        high, low = _sort(names, scale)
        if not high:
            raise DataError(
                f"{path} holds no large picture for scale {scale}. Expected HR files or a folder HR."
            )
        if low and (lost := sorted(set(high) - set(low))):
            raise DataError(
                f"{path} has small pictures for some only; {lost[0]} (and {len(lost) - 1} more) have none."
            )
        for name, member in sorted(high.items()):
            large = read_photo(read(member)).pixels
            small = read_photo(read(low[name])).pixels if low else None
            if small is not None:
                height, width = (side * scale for side in small.shape[:2])
                if not (0 <= large.shape[0] - height < scale and 0 <= large.shape[1] - width < scale):
                    raise DataError(
                        f"{member} is {large.shape[1]} x {large.shape[0]} and its small picture "
                        f"{small.shape[1]} x {small.shape[0]}: not {scale} times."
                    )
            yield SRPair(name, large, small)


@contextmanager
def _opened(path: Path) -> Iterator:
    """Give the names of all pictures, and a function that reads one."""
    if path.is_dir():
        yield [str(entry.relative_to(path).as_posix()) for entry in _pictures(path)], lambda n: path / n
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if PurePosixPath(n).suffix.lower() in SUFFIXES]
            yield names, archive.read
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no readable zip file: {error}.") from error


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file())


def _sort(names: list[str], scale: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return large and small pictures by name; those of other scales are left out."""
    high: dict[str, str] = {}
    low: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        stem = path.stem
        scales = {int(found[1]) for part in (*path.parts[:-1], stem) if (found := _SCALE.match(part))}
        if scales and scale not in scales:
            continue
        small = any(_LOW_FOLDER.match(part) and part.lower() != f"x{scale}" for part in path.parts[:-1])
        small = small or bool(re.search(r"[_-]LR(?:[_-]?x\d)?$", stem, re.IGNORECASE))
        (low if small else high)[_ENDING.sub("", stem)] = name
    return high, low
