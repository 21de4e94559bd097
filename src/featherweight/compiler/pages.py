"""Memory of a loaded network: one run of bytes, in pages of 2 MB where the system has them.

Weights pass once an image. In pages of 4 KB every fourth kilobyte costs a look-up of its address, which a
stream of multiply-adds does not hide.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

ALIGNMENT = 64
HUGE_BYTES = 2**21


def allocate(size_bytes: int) -> np.ndarray:
    """Return `size_bytes` of memory (uint8), aligned to 64.

    Only whole large pages are asked for, so that no more memory is taken than with small ones.
    """
    if size_bytes < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.empty(size_bytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size_bytes]
    memory = mmap.mmap(-1, size_bytes + HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % HUGE_BYTES
    # A kernel without large pages says so; the small ones serve as well.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE, start, size_bytes // HUGE_BYTES * HUGE_BYTES)
    return raw[start : start + size_bytes]
