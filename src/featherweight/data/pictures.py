"""Pictures for training restoration: read any folder or zip file once, make the small ones, cut out patches.

The small picture is made from the whole large one by MATLAB's bicubic rule, as the test sets are, so that a
patch has the same pixels as the picture it is cut from. A picture smaller than a patch is mirrored outwards
first. Pictures stay in memory as bytes; where they would need more than `MEMORY_BYTES`, in one file.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from featherweight.data.bicubic import imresize
from featherweight.data.images import SUFFIXES, open_image
from featherweight.errors import DataError

log = logging.getLogger("featherweight")

MEMORY_BYTES = 2 << 30
"""Bytes of pixels kept in memory; beyond that a file holds them."""

Progress = Callable[[int, int], None]
"""Called with the pictures read and their number."""


@dataclass(frozen=True)
class Pictures:
    """Large pictures (H, W, 3) and their small ones, uint8, with what was left out and why.

    Args:
        scale: sides of a large picture over those of its small one.
        names: of the pictures.
        high: the large ones, both sides multiples of the scale.
        low: the small ones.
        skipped: name and reason of every file that could not be used.
    """

    scale: int
    names: tuple[str, ...]
    high: Sequence[np.ndarray]
    low: Sequence[np.ndarray]
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int]) -> Pictures:
        """Return some of the pictures."""
        high, low = ([pictures[i] for i in indices] for pictures in (self.high, self.low))
        return Pictures(self.scale, tuple(self.names[i] for i in indices), high, low, self.skipped)

    def fingerprint(self) -> str:
        """Return a digest of the sizes and of some rows of every picture."""
        digest = hashlib.sha256(repr((self.scale, self.names)).encode())
        for picture in self.high:
            digest.update(repr(picture.shape).encode())
            digest.update(np.ascontiguousarray(picture[:: max(1, len(picture) // 8)]).tobytes())
        return digest.hexdigest()


def list_pictures(place: str | Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Return name and reader of every picture in a folder, below it, in a zip file, or of one file.

    Raises:
        DataError: there is no such place, or nothing in it ends like a picture.
    """
    place = Path(place)
    if place.is_dir():
        archives = sorted(place.glob("*.zip"))
        files = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES]
        if not files and len(archives) == 1:
            return list_pictures(archives[0])
        found = [(path.relative_to(place).as_posix(), path.read_bytes) for path in files if path.is_file()]
    elif place.suffix.lower() == ".zip" and place.is_file():
        found = _zipped(place)
    elif place.is_file():
        found = [(place.name, place.read_bytes)]
    else:
        raise DataError(f"No pictures at {place}. Expected a folder or a zip file of photographs.")
    if not found:
        raise DataError(
            f"{place} holds no picture. Expected files ending in {', '.join(sorted(SUFFIXES)[:6])}..."
        )
    return found


def _zipped(place: Path) -> list[tuple[str, Callable[[], bytes]]]:
    try:
        archive = zipfile.ZipFile(place)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{place} is no readable zip file: {error}.") from error
    names = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in SUFFIXES]
    return [(name, lambda name=name: archive.read(name)) for name in sorted(names)]


def load_pictures(
    place: str | Path,
    scale: int,
    patch: int,
    *,
    limit: int | None = None,
    spill: Path | None = None,
    progress: Progress | None = None,
) -> Pictures:
    """Read all pictures of a place and make their small ones; unreadable files are left out.

    Args:
        place: folder, zip file or single file.
        scale: sides of the large over sides of the small pictures; 1 makes both the same.
        patch: side of a patch of a large picture, in pixels; smaller pictures are mirrored outwards to it.
        limit: at most this many pictures, the first by name.
        spill: file for the pixels where they need more than `MEMORY_BYTES`; None keeps all in memory.
        progress: called after every file.

    Raises:
        DataError: nothing there can be used.
    """
    sources = list_pictures(place)[:limit]
    names, high, low, skipped = [], [], [], []
    store = _Store(spill)
    for index, (name, picture, reason) in enumerate(_decoded(sources, scale, patch)):
        if picture is None:
            skipped.append((name, reason))
            log.warning("skipped %s: %s", name, reason)
        else:
            names.append(name)
            high.append(store.keep(picture))
            low.append(store.keep(picture if scale == 1 else imresize(picture, 1 / scale)))
        if progress:
            progress(index + 1, len(sources))
    if not names:
        raise DataError(f"None of the {len(sources)} pictures at {place} can be used: {skipped[0][1]}")
    return Pictures(scale, tuple(names), high, low, tuple(skipped))


class _Store:
    """Keeps arrays in memory up to a limit, then in a file."""

    def __init__(self, spill: Path | None) -> None:
        self.spill, self.bytes = spill, 0

    def keep(self, pixels: np.ndarray) -> np.ndarray:
        """Return the same pixels, kept."""
        self.bytes += pixels.nbytes
        if self.spill is None or self.bytes <= MEMORY_BYTES:
            return pixels
        self.spill.parent.mkdir(parents=True, exist_ok=True)
        with self.spill.open("ab") as stream:
            offset = stream.tell()
            stream.write(pixels.tobytes())
        return np.memmap(self.spill, np.uint8, "r", offset, pixels.shape)


def _decoded(
    sources: Sequence[tuple[str, Callable[[], bytes]]], scale: int, patch: int
) -> Iterator[tuple[str, np.ndarray | None, str]]:
    for name, read in sources:
        try:
            picture = np.asarray(open_image(read()).convert("RGB"))
        except (DataError, OSError, zipfile.BadZipFile) as error:
            yield name, None, str(error)
            continue
        height, width = (max(side - side % scale, patch) for side in picture.shape[:2])
        grow = [(0, max(0, want - have)) for want, have in zip((height, width), picture.shape, strict=False)]
        grown = np.pad(picture, [*grow, (0, 0)], mode="symmetric") if any(g for _, g in grow) else picture
        yield name, np.ascontiguousarray(grown[:height, :width]), ""
