"""What the benchmarks share: jobs timed in turns, the origin of a row, and rows that replace older ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featherweight.files import atomic_write
from featherweight.measure.latency import CLOCKS, Latency, summarize, time_jobs
from featherweight.measure.machine import machine, machine_id

__all__ = ["CLOCKS", "cells", "in_turns", "merge_rows", "provenance", "store"]


def in_turns(
    jobs: Mapping[str, Callable[[], object]],
    runs: int,
    threads: int,
    seconds: float = float("inf"),
    clock: str = "wall",
) -> dict[str, Latency]:
    """Time jobs by name as `time_jobs` does, after a round that does not count.

    Args:
        jobs: what to run, by name.
        runs: rounds.
        threads: what the result says of threads; set them before.
        seconds: see `time_jobs`.
        clock: see `time_jobs`.
    """
    times = time_jobs(list(jobs.values()), runs, seconds=seconds, clock=clock)
    return {name: summarize(values, threads) for name, values in zip(jobs, times, strict=True)}


def cells(latency: Latency) -> dict[str, Any]:
    """Return the cells of a row that tell a latency."""
    low, high = latency.interval
    points = {"p50_ms": latency.p50_ms, "low_ms": low, "high_ms": high}
    return {**{name: f"{value:.3f}" for name, value in points.items()}, "runs": latency.runs}


def provenance(packages: Sequence[str] = ("featherweight", "torch"), processor: str = "") -> dict[str, str]:
    """Return the cells of a row that tell when, where and with which packages it was measured.

    Args:
        packages: whose versions count; "none" stands for one that is not installed.
        processor: what did the work; the CPU by default.
    """
    here = machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor or f"{here['cpu']}, {here['cores']} cores",
        "versions": " ".join(f"{package}={_version(package)}" for package in packages),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def merge_rows(
    text: str, rows: Iterable[Mapping[str, Any]], key: Sequence[str], columns: Sequence[str]
) -> str:
    """Return the CSV `text` with `rows` added, sorted; a row with the same values of `key` is replaced."""
    merged = {tuple(row[part] for part in key): row for row in csv.DictReader(io.StringIO(text))}
    for row in rows:
        merged[tuple(str(row[part]) for part in key)] = dict(row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged[values] for values in sorted(merged))
    return stream.getvalue()


def store(
    folder: Path, rows: Iterable[Mapping[str, Any]], key: Sequence[str], columns: Sequence[str]
) -> Path:
    """Merge rows into this machine's CSV in `folder` and return its path."""
    path = folder / f"{machine_id()}.csv"
    atomic_write(path, merge_rows(path.read_text() if path.exists() else "", rows, key, columns))
    return path
