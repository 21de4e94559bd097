"""Look at every image of a store once: is it readable, how large, coloured, and what are its pixels' digest.

Decoding is the cost, so what was decoded is kept (at its own size) while it fits into memory, and later
requests at any size start from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from featherweight.data.images import is_grey, open_image
from featherweight.data.store import ArrayStore, ImageStore
from featherweight.errors import DataError

CACHE_BYTES = 1 << 30
_CHUNK = 256
_SHOW_PROGRESS_FROM = 2000
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scan:
    """What a look at every image of a store found.

    Args:
        readable: indices of the readable images, ascending.
        skipped: (name, reason) of the others.
        digests: bytes, one per readable image; equal pixels give equal digests.
        sizes: (height, width) per readable image, int64 of shape (N, 2).
        grey: whether no readable image has colour.
        pixels: the decoded images in the order of `readable`: one array, a list, or None if memory is short.
    """

    readable: np.ndarray
    skipped: tuple[tuple[str, str], ...]
    digests: list[bytes]
    sizes: np.ndarray
    grey: bool
    pixels: np.ndarray | list[np.ndarray] | None


@dataclass(eq=False)
class _Look:
    """One chunk's findings while the scan runs; `spent` is shared and counts the bytes kept so far."""

    readable: list[int]
    skipped: list[tuple[str, str]]
    digests: list[bytes]
    sizes: list[tuple[int, int]]
    pixels: list[np.ndarray]
    grey: bool = True


def scan_store(store: ImageStore, cache_bytes: int | None = None) -> Scan:
    """Decode every image of `store` once, in threads.

    Args:
        store: the images.
        cache_bytes: keep the decoded images up to this many bytes; default `CACHE_BYTES` or less.
    """
    limit = min(CACHE_BYTES, _memory_bytes() // 8) if cache_bytes is None else cache_bytes
    if isinstance(store, ArrayStore):
        return _scan_array(store)
    spent = [0]
    looks = run_chunks(len(store), lambda low, high: _look(store, low, high, spent, limit), "reading images")
    readable = [index for look in looks for index in look.readable]
    pixels = [image for look in looks for image in look.pixels]
    kept: np.ndarray | list[np.ndarray] | None = pixels
    if spent[0] > limit:
        kept = None
    elif pixels and len({image.shape for image in pixels}) == 1:
        kept = np.stack(pixels)
    return Scan(
        readable=np.array(readable, np.int64),
        skipped=tuple(entry for look in looks for entry in look.skipped),
        digests=[digest for look in looks for digest in look.digests],
        sizes=np.array([size for look in looks for size in look.sizes], np.int64).reshape(-1, 2),
        grey=all(look.grey for look in looks),
        pixels=kept,
    )


def run_chunks(count: int, work: Callable[[int, int], T], title: str, chunk: int = _CHUNK) -> list[T]:
    """Call `work(low, high)` over chunks of `range(count)` in threads; results in order, progress shown."""
    spans = [(low, min(low + chunk, count)) for low in range(0, count, chunk)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        results = pool.map(lambda span: work(*span), spans)
        if count < _SHOW_PROGRESS_FROM or not sys.stderr.isatty():
            return list(results)
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        return list(track(results, description=title, total=len(spans), console=console, transient=True))


def digest_pixels(pixels: np.ndarray) -> bytes:
    """Return a digest of shape and pixels; exact duplicates share it whatever file format held them."""
    return blake2b(np.ascontiguousarray(pixels), digest_size=12, key=str(pixels.shape).encode()).digest()


def _look(store: ImageStore, low: int, high: int, spent: list[int], limit: int) -> _Look:
    look = _Look([], [], [], [], [])
    for index in range(low, high):
        try:
            pixels = np.asarray(open_image(store[index]))
        except DataError as error:
            look.skipped.append((store.name(index), str(error)))
            continue
        look.readable.append(index)
        look.digests.append(digest_pixels(pixels))
        look.sizes.append(pixels.shape[:2])
        look.grey = look.grey and is_grey(pixels)
        # Threads may overshoot by one image each: the limit is a guard, not an account.
        spent[0] += pixels.nbytes
        if spent[0] <= limit:
            look.pixels.append(pixels)
    return look


def _scan_array(store: ArrayStore) -> Scan:
    pixels: Sequence[np.ndarray] = store.pixels
    if store.pixels.ndim == 4 and store.pixels.shape[3] == 4:
        pixels = np.stack([np.asarray(open_image(image)) for image in store.pixels])
    elif store.pixels.ndim == 4 and store.pixels.shape[3] == 1:
        pixels = store.pixels[..., 0]
    count = len(pixels)
    return Scan(
        readable=np.arange(count),
        skipped=(),
        digests=[digest_pixels(image) for image in pixels],
        sizes=np.tile(np.array(store.pixels.shape[1:3], np.int64), (count, 1)),
        grey=all(is_grey(image) for image in pixels),
        pixels=np.asarray(pixels),
    )


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 << 30
