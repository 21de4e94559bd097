"""Keeps the memory that a training step frees ready for the next step."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3) and the largest values that it takes.
_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1
_MMAP_THRESHOLD, _LARGEST = -3, 32 * 2**20


def keep_freed_memory() -> bool:
    """Make the C library keep freed blocks instead of returning them to the system; tell whether it does.

    Every step frees and asks for the same activations. By default glibc maps each large one anew, and the
    system clears its pages again, which takes about a tenth of a step of a small network. The setting
    holds for the process. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _NEVER))
    return all([library.mallopt(name, value) == 1 for name, value in settings])
