"""Screening: what each candidate would weigh and how long it would take here, before anything is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featherweight.errors import BudgetError
from featherweight.export.onnx import export_onnx
from featherweight.files import atomic_write_json, cache_folder
from featherweight.measure.count import count, count_onnx
from featherweight.measure.latency import measure_latency
from featherweight.measure.machine import machine_id
from featherweight.shrink.quantize import quantize_onnx
from featherweight.train.speed import training_images_per_s, training_macs_per_s
from featherweight.workflows.budget import Budget
from featherweight.workflows.candidates import Candidate

log = logging.getLogger("featherweight")

_LATENCY_RUNS = 60
_CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class Screened:
    """Figures of one candidate with random weights, and why it was dropped (empty when it stays).

    Latency and size are those of the int8 file, or of the float32 file where that one is faster and fits.
    `images_per_s` is the training speed, where it was measured.
    """

    candidate: Candidate
    macs: int
    params: int
    size_bytes: int = 0
    latency_ms: float = 0.0
    float32_latency_ms: float = 0.0
    images_per_s: float = 0.0
    dropped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def screen(
    candidates: Sequence[Candidate],
    num_classes: int,
    in_chans: int,
    budget: Budget,
    keep: int,
    work_dir: Path,
    min_images_per_s: float = 0.0,
    time_s: float = math.inf,
) -> list[Screened]:
    """Weigh every candidate; export and time the most capable `keep` of those that may fit.

    Counting needs no export, so candidates that miss the MAC or size limit by their counts alone go first.

    Args:
        candidates: what may be tried.
        num_classes: classes of the data set.
        in_chans: 1 for grey images, 3 for colour.
        budget: the limits.
        keep: how many fitting candidates are wanted; the search for more stops there.
        work_dir: folder for the exported files.
        min_images_per_s: training speed below which the time is too short to learn from; 0 asks for none.
            The fastest candidate stays even so.
        time_s: seconds after which nothing more is measured, once something fits the budget; three times as
            many where all that fits trains too slowly.

    Raises:
        BudgetError: no candidate fits; the message names the tight limit and the nearest candidate's need.
    """
    began = time.monotonic()
    counted = [_count(candidate, num_classes, in_chans, budget) for candidate in candidates]
    counted = _affordable(counted, min_images_per_s)
    for entry in counted:
        if entry.dropped:
            log.debug("%s: dropped, %s", entry.candidate.label, entry.dropped)
    results, fitting = [entry for entry in counted if entry.dropped], 0
    ceiling: dict[str, float] = {}
    waiting = [entry for entry in counted if not entry.dropped]
    slow = _slow_networks(waiting, num_classes, in_chans, min_images_per_s)
    for entry in _slow_last(_round_robin(waiting), slow):
        name = entry.candidate.model
        spent_s = time.monotonic() - began
        done = fitting >= keep or _is_late(spent_s, time_s, fitting, results)
        reason = "not tried: the time is for the others" if done else ""
        if fitting and name in slow:
            reason = _slow_reason(slow[name])
        if entry.macs > ceiling.get(name, math.inf):
            reason = "a smaller one of the same network already misses the latency or takes too long to train"
        if reason:
            results.append(dataclasses.replace(entry, dropped=reason))
            continue
        measured = _measure(entry, num_classes, in_chans, budget, work_dir)
        if not measured.dropped and min_images_per_s:
            measured = _timed_training(measured, num_classes, in_chans, min_images_per_s)
        fitting += not measured.dropped and not _is_too_slow(measured, min_images_per_s)
        results.append(measured)
        ceiling[name] = min(ceiling.get(name, math.inf), _ceiling(measured, budget, min_images_per_s))
        log.info("%s: %s", measured.candidate.label, measured.dropped or _figures(measured))
    results = _without_slow(results, min_images_per_s)
    if all(entry.dropped for entry in results) and waiting:
        cheapest = min(waiting, key=lambda entry: entry.macs)
        results = [entry for entry in results if entry.candidate != cheapest.candidate]
        results.append(_measure(cheapest, num_classes, in_chans, budget, work_dir))
    if all(entry.dropped for entry in results):
        raise BudgetError(_nothing_fits(results, budget))
    return results


def _figures(entry: Screened) -> str:
    speed = f", {entry.images_per_s:,.0f} images/s in training" if entry.images_per_s else ""
    return (
        f"{entry.latency_ms:.3f} ms, {entry.size_bytes / 1e3:,.0f} kB, {entry.macs / 1e6:,.1f} M MACs{speed}"
    )


def _count(candidate: Candidate, num_classes: int, in_chans: int, budget: Budget) -> Screened:
    try:
        with torch.device("meta"):
            model = candidate.build(num_classes, in_chans).eval()
        counted = count(model, (in_chans, candidate.input, candidate.input))
    except (RuntimeError, ValueError):
        return Screened(
            candidate, macs=0, params=0, dropped=f"images of {candidate.input} px are too small for it"
        )
    # An int8 file holds at least a byte for each parameter, so the count bounds its size from below.
    lines = budget.violations(0.0, counted.params, counted.macs)
    return Screened(candidate, counted.macs, counted.params, counted.params, dropped="; ".join(lines))


def _affordable(entries: list[Screened], min_images_per_s: float) -> list[Screened]:
    """Drop what even at the speed of plain convolutions learns too slowly; the cheapest always stays."""
    if not min_images_per_s:
        return entries
    cheapest = min((entry.macs for entry in entries if not entry.dropped), default=0)
    limit = max(training_macs_per_s() / 3 / min_images_per_s, cheapest)
    reason = f"training time: more than {limit / 1e6:.1f} M MACs see the data too seldom in --time"
    return [
        dataclasses.replace(entry, dropped=reason) if not entry.dropped and entry.macs > limit else entry
        for entry in entries
    ]


def _slow_networks(
    entries: list[Screened], num_classes: int, in_chans: int, min_images_per_s: float
) -> dict[str, float]:
    """Return the networks that train too slowly even in their cheapest form, with their images per second.

    That takes a fraction of the time that exporting and timing one of their candidates would.
    """
    if not min_images_per_s:
        return {}
    cheapest: dict[str, Screened] = {}
    for entry in sorted(entries, key=lambda entry: entry.macs):
        cheapest.setdefault(entry.candidate.model, entry)
    timed = {
        name: _timed_training(entry, num_classes, in_chans, min_images_per_s)
        for name, entry in cheapest.items()
    }
    return {
        name: entry.images_per_s for name, entry in timed.items() if _is_too_slow(entry, min_images_per_s)
    }


def _slow_reason(images_per_s: float) -> str:
    return f"training time: {images_per_s:,.0f} images/s see the data too seldom in --time"


def _timed_training(entry: Screened, num_classes: int, in_chans: int, enough: float) -> Screened:
    candidate = entry.candidate
    torch.manual_seed(0)
    model = candidate.build(num_classes, in_chans)
    speed = training_images_per_s(model, (in_chans, candidate.input, candidate.input), enough)
    return dataclasses.replace(entry, images_per_s=speed)


def _is_late(spent_s: float, time_s: float, fitting: int, results: list[Screened]) -> bool:
    allowed_s = time_s if fitting else 3 * time_s
    return spent_s > allowed_s and any(not entry.dropped for entry in results)


def _ceiling(entry: Screened, budget: Budget, min_images_per_s: float) -> float:
    """Return the MACs above which others of the same network are not worth measuring.

    Both times grow about as MACs within one network; slack keeps those that might still meet the latency.
    """
    ratios = [math.inf]
    if budget.max_latency_ms is not None and entry.latency_ms > budget.max_latency_ms:
        ratios.append(1.5 * budget.max_latency_ms / entry.latency_ms)
    if _is_too_slow(entry, min_images_per_s):
        ratios.append(entry.images_per_s / min_images_per_s)
    return entry.macs * min(ratios)


def _is_too_slow(entry: Screened, min_images_per_s: float) -> bool:
    return bool(entry.images_per_s) and entry.images_per_s < min_images_per_s


def _without_slow(entries: list[Screened], min_images_per_s: float) -> list[Screened]:
    """Drop what trains too slowly for the time; the fastest of them stays where nothing else does."""
    fitting = [entry for entry in entries if not entry.dropped]
    fastest = max((entry.images_per_s for entry in fitting), default=0.0)
    limit = min(min_images_per_s, fastest)
    return [
        dataclasses.replace(entry, dropped=_slow_reason(entry.images_per_s))
        if not entry.dropped and _is_too_slow(entry, limit)
        else entry
        for entry in entries
    ]


def _round_robin(entries: list[Screened]) -> list[Screened]:
    """Order by capability: first the most capable of each network, then the second of each, and so on.

    Both the work done on an image and the weights learnt count: their product is what ranks.
    """
    groups: dict[str, list[Screened]] = {}
    for entry in sorted(entries, key=lambda entry: -entry.macs * entry.params):
        groups.setdefault(entry.candidate.model, []).append(entry)
    # Groups were opened in the order of their largest member, so each turn is in that order too.
    turns = [[group[turn] for group in groups.values() if turn < len(group)] for turn in range(len(entries))]
    return [entry for turn in turns for entry in turn]


def _slow_last(entries: list[Screened], slow: Mapping[str, float]) -> list[Screened]:
    """Move the networks that train slowly to the end, for the case that no other fits: the cheapest first."""
    late = [entry for entry in entries if entry.candidate.model in slow]
    return [entry for entry in entries if entry not in late] + sorted(late, key=lambda entry: entry.macs)


def _measure(entry: Screened, num_classes: int, in_chans: int, budget: Budget, work_dir: Path) -> Screened:
    figures = _cached_figures(entry.candidate, num_classes, in_chans, work_dir)
    int8 = (figures["int8_latency_ms"], figures["int8_size_bytes"], figures["macs"])
    float32 = (figures["float32_latency_ms"], figures["float32_size_bytes"], figures["macs"])
    best = min((int8, float32), key=lambda form: (bool(budget.violations(*form)), form[0]))
    return dataclasses.replace(
        entry,
        latency_ms=best[0],
        size_bytes=best[1],
        macs=best[2],
        float32_latency_ms=float32[0],
        dropped="; ".join(budget.violations(*best)),
    )


def _cached_figures(candidate: Candidate, num_classes: int, in_chans: int, work_dir: Path) -> dict[str, Any]:
    key = json.dumps([candidate.to_dict(), num_classes, in_chans, machine_id()], sort_keys=True)
    path = cache_folder("screening") / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path.exists():
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError:
            log.warning("Ignoring the damaged cache file %s", path)
    figures = _export_and_time(candidate, num_classes, in_chans, work_dir)
    atomic_write_json(path, figures)
    return figures


def _export_and_time(candidate: Candidate, num_classes: int, in_chans: int, work_dir: Path) -> dict[str, Any]:
    work_dir.mkdir(parents=True, exist_ok=True)
    float_path, int8_path = work_dir / f"{candidate.label}.onnx", work_dir / f"{candidate.label}.int8.onnx"
    shape = (in_chans, candidate.input, candidate.input)
    torch.manual_seed(0)
    export_onnx(candidate.build(num_classes, in_chans).eval(), float_path, shape)
    calibration = np.random.default_rng(0).standard_normal((_CALIBRATION_IMAGES, *shape)).astype(np.float32)
    quantize_onnx(float_path, int8_path, calibration)
    counted = count_onnx(float_path)
    return {
        "macs": counted.macs,
        "float32_size_bytes": float_path.stat().st_size,
        "int8_size_bytes": int8_path.stat().st_size,
        "float32_latency_ms": measure_latency(float_path, threads=1, runs=_LATENCY_RUNS).p50_ms,
        "int8_latency_ms": measure_latency(int8_path, threads=1, runs=_LATENCY_RUNS).p50_ms,
    }


def _nothing_fits(results: list[Screened], budget: Budget) -> str:
    # Whatever was dropped unmeasured for another reason has nothing to say about the budget.
    missed = [entry for entry in results if budget.violations(entry.latency_ms, entry.size_bytes, entry.macs)]
    if not missed:
        return f"No candidate can be used: {results[0].dropped}. Name other networks with --models."
    nearest = min(missed, key=lambda entry: budget.excess(entry.latency_ms, entry.size_bytes, entry.macs))
    return (
        f"No candidate fits the budget. The nearest, {nearest.candidate.label}, misses it by "
        f"{nearest.dropped}. Loosen that limit, or name other networks with --models."
    )
