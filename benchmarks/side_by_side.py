"""What the benchmarks share: jobs timed in turns, and rows that replace older ones in a CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from featherweight.measure.latency import Latency, summarize

LEAST_TURNS = 5
"""Turns that a time limit does not cut."""


CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
"""The time that passes, or what this process has used of the processor, all threads together."""


def in_turns(
    jobs: Mapping[str, Callable[[], object]],
    runs: int,
    threads: int,
    seconds: float = float("inf"),
    clock: str = "wall",
) -> dict[str, Latency]:
    """Time jobs one after another, round by round, after a round that does not count.

    A change of the processor's clock hits all jobs alike.

    Args:
        jobs: what to run, by name.
        runs: rounds.
        threads: what the result says of threads; set them before.
        seconds: begin no further round after this time, but run `LEAST_TURNS` of the rounds at least.
        clock: a key of `CLOCKS`; `"cpu"` is fair on a busy machine, for one thread.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    began = time.monotonic()
    for turn in range(runs + 1):
        if turn > LEAST_TURNS and time.monotonic() - began > seconds:
            break
        for name, job in jobs.items():
            start = CLOCKS[clock]()
            job()
            if turn:
                times[name].append((CLOCKS[clock]() - start) / 1e6)
    return {name: summarize(values, threads) for name, values in times.items()}


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
