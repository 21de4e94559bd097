"""Time ONNX files with onnxruntime on this machine's CPU. Imports neither PyTorch nor the rest of the
library.

One image per run, warm-up first, the median of at least 50 runs with a 95 % interval. Files to compare are
timed in turns, one run each, so that a change of the processor's clock hits all alike.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import DataError
from featherweight.files import atomic_write_json, cache_folder
from featherweight.measure.machine import machine_id

if TYPE_CHECKING:
    import onnxruntime


CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
"""The time that passes, or what this process has used of the processor, all threads together."""

LEAST_TURNS = 5
"""Rounds that a time limit does not cut."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image: median, 95th percentile, and the median's 95 % interval."""

    p50_ms: float
    p95_ms: float
    threads: int
    runs: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Interleaved latencies of several files; `verdict` names the faster one or says "no difference"."""

    latencies: tuple[Latency, ...]
    verdict: str


def median_interval(sorted_times: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median of sorted values, by order statistics: no distribution is
    assumed.

    >>> median_interval(list(range(100)))
    (40, 59)
    """
    n = len(sorted_times)
    spread = 1.959964 * math.sqrt(n) / 2
    low, high = math.floor(n / 2 - spread), math.ceil(n / 2 + spread) - 1
    return sorted_times[max(low, 0)], sorted_times[min(high, n - 1)]


def summarize(times_ms: Sequence[float], threads: int) -> Latency:
    """Turn single times in milliseconds into a `Latency`."""
    ordered = sorted(float(t) for t in times_ms)
    p50, p95 = np.percentile(ordered, [50, 95])
    return Latency(float(p50), float(p95), threads, len(ordered), median_interval(ordered))


def time_jobs(
    jobs: Sequence[Callable[[], object]],
    runs: int,
    warmup: int = 1,
    *,
    seconds: float = math.inf,
    clock: str = "wall",
) -> list[list[float]]:
    """Time jobs one after another, round by round; a change of the processor's clock hits all alike.

    Args:
        jobs: what to run.
        runs: rounds.
        warmup: rounds before, which do not count.
        seconds: begin no further round after this time, but run `LEAST_TURNS` of the rounds at least.
        clock: a key of `CLOCKS`; `"cpu"` is fair on a busy machine, for one thread.

    Returns:
        The times of each job, in milliseconds.

    >>> [len(times) for times in time_jobs([list, dict], runs=3)]
    [3, 3]
    """
    times: list[list[float]] = [[] for _ in jobs]
    began = time.monotonic()
    for turn in range(-warmup, runs):
        if turn >= LEAST_TURNS and time.monotonic() - began > seconds:
            break
        for job, row in zip(jobs, times, strict=True):
            start = CLOCKS[clock]()
            job()
            if turn >= 0:
                row.append((CLOCKS[clock]() - start) / 1e6)
    return times


def _open(path: Path, threads: int) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    """Open a session and make one input of noise for it; unknown dimensions become 1."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Worker threads spin between operators (the default): quickest, and the usual way to serve.
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if not path.is_file():
        raise DataError(f"No ONNX file at {path} to time.")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error
    rng = np.random.default_rng(0)
    feed = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in value.shape]
        feed[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return session, feed


def _time_in_turns(paths: Sequence[Path], threads: int, runs: int, warmup: int) -> list[list[float]]:
    """Return `runs` times in milliseconds per file."""
    opened = [_open(path, threads) for path in paths]
    jobs = [functools.partial(session.run, None, feed) for session, feed in opened]
    return time_jobs(jobs, runs, warmup)


def measure_latency(
    onnx_path: str | Path, threads: int = 1, runs: int = 100, warmup: int = 10, *, cache: bool = False
) -> Latency:
    """Time one image through an ONNX file on the CPU.

    Args:
        onnx_path: the file.
        threads: threads onnxruntime may use inside an operator.
        runs: timed runs; 50 or more for a figure to publish, fewer to sort candidates.
        warmup: runs before.
        cache: look the result up by machine, onnxruntime's version, file content and settings, and store it.

    Raises:
        DataError: the file is missing or onnxruntime refuses it.
    """
    path = Path(onnx_path)
    entry = _cache_entry(path, threads, runs) if cache and path.is_file() else None
    if entry is not None and (known := _read_cache(entry)) is not None:
        return known
    latency = summarize(_time_in_turns([path], threads, runs, warmup)[0], threads)
    if entry is not None:
        atomic_write_json(entry, asdict(latency))
    return latency


def compare(paths: Sequence[str | Path], threads: int = 1, runs: int = 100, warmup: int = 10) -> Comparison:
    """Time files in turns and say which is fastest, or "no difference" where its interval meets another's.

    Raises:
        DataError: a file is missing or onnxruntime refuses it.
    """
    files = [Path(path) for path in paths]
    latencies = [summarize(times, threads) for times in _time_in_turns(files, threads, runs, warmup)]
    order = sorted(range(len(files)), key=lambda i: latencies[i].p50_ms)
    verdict = "no difference"
    if len(order) > 1 and all(latencies[order[0]].interval[1] < latencies[i].interval[0] for i in order[1:]):
        ratio = latencies[order[1]].p50_ms / latencies[order[0]].p50_ms
        verdict = f"{files[order[0]].name} is {ratio:.2f} times as fast as {files[order[1]].name}"
    return Comparison(tuple(latencies), verdict)


def _cache_entry(path: Path, threads: int, runs: int) -> Path:
    import onnxruntime

    content = hashlib.sha256(path.read_bytes()).hexdigest()
    key = json.dumps([machine_id(), onnxruntime.__version__, content, threads, runs])
    return cache_folder("latency") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_cache(entry: Path) -> Latency | None:
    """Return a remembered latency; a missing or damaged entry counts as none."""
    try:
        latency = Latency(**json.loads(entry.read_text()))
        return replace(latency, interval=(float(latency.interval[0]), float(latency.interval[1])))
    except (OSError, ValueError, TypeError, IndexError):
        return None
