"""The machine's peak: float32 multiply-adds a second of one thread, by independent chains of them."""

from __future__ import annotations

import ctypes
import tempfile
import time
from pathlib import Path

from featherweight.compiler.build import Target, build_library, vector_floats
from featherweight.compiler.source import kernel_text

CHAINS = 12
ROUNDS, REPEATS = 200_000, 7


def measure_peak(target: Target) -> float:
    """Return multiply-adds a second of one thread, the best of some short runs."""
    with tempfile.TemporaryDirectory() as place:
        source, library = Path(place) / "peak.c", Path(place) / "libpeak.so"
        source.write_text(kernel_text("vector.h") + kernel_text("peak.h"), encoding="utf-8")
        build_library([source], library, target)
        run = ctypes.CDLL(str(library)).fw_peak_run
    run.restype, run.argtypes = ctypes.c_float, [ctypes.c_long]
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run(ROUNDS)
        best = min(best, time.perf_counter() - start)
    return ROUNDS * CHAINS * vector_floats(target) / best
