"""Show a paper's claim in miniature, and record the verdict whatever it is.

An entry is a file `reproductions/<slug>.py` with a function
`reproduce(quick, data_root, seed, progress) -> Reproduction`. A quick run checks that the entry works; its
verdict is always "inconclusive" and it is never recorded beside the full ones.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featherweight.cards import PACKAGE_ROOT
from featherweight.errors import FeatherweightError, UsageError, close_matches
from featherweight.files import atomic_write, atomic_write_json
from featherweight.workflows.catalogue import source_root

HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Reproduction:
    """What a miniature showed.

    Args:
        slug: the system.
        claim: the claim, in one sentence.
        rows: one per configuration, ready to print: name, counts, mean and spread over seeds.
        verdict: `"holds"`, `"does not hold"` or `"inconclusive"`.
        reason: the comparison that led to the verdict.
        measured: the figures of every seed, by configuration.
        setting: data, epochs, seeds: what the figures depend on.
        wall_s: time of the run in seconds.
    """

    slug: str
    claim: str
    rows: list[dict[str, Any]]
    verdict: str
    reason: str
    measured: dict[str, list[float]] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def entries_folder() -> Path:
    """Return the folder of the entries: of the checkout, else the copy inside the package."""
    root = source_root()
    return root / "reproductions" if root else PACKAGE_ROOT / "_reproductions"


def entries() -> dict[str, Path]:
    """Return the systems that have an entry, with its file."""
    return {path.stem: path for path in sorted(entries_folder().glob("[a-z]*.py"))}


def reproduce(
    slug: str,
    quick: bool = False,
    data_root: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    out: str | Path | None = None,
) -> Reproduction:
    """Run the miniature of a system's claim and record the result.

    Args:
        slug: a system with an entry.
        quick: tiny subset, one seed: checks the entry, gives no verdict.
        data_root: folder holding the built-in data sets.
        seed: the first seed.
        progress: gets a line of text now and then.
        out: folder of the result; None takes `benchmarks/results/reproductions` (quick:
            `runs/reproductions`).

    Raises:
        UsageError: the system has no entry.
        DataError: the data set is not there.
    """
    data_root = Path(data_root) if data_root else None
    result = run_entry(slug, quick=quick, data_root=data_root, seed=seed, progress=progress)
    record(result, quick=quick, seed=seed, out=Path(out) if out else None)
    return result


def run_entry(
    slug: str, *, quick: bool, data_root: Path | None, seed: int, progress: Progress | None = None
) -> Reproduction:
    """Run an entry without recording it; arguments as in `reproduce`."""
    known = entries()
    if slug not in known:
        raise UsageError(
            f"No reproduction of '{slug}'.{close_matches(slug, known)} Known: {', '.join(known)}"
        )
    name = f"featherweight_reproduction_{slug}"
    spec = importlib.util.spec_from_file_location(name, known[slug])
    if spec is None or spec.loader is None:
        raise FeatherweightError(f"{known[slug]} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up here
    spec.loader.exec_module(module)
    began = time.monotonic()
    result = module.reproduce(quick, data_root, seed, progress or (lambda line: None))
    if quick:
        result = replace(result, verdict=OPEN, reason="Quick run: one seed on a tiny subset shows nothing.")
    return replace(result, wall_s=round(time.monotonic() - began, 1))


def record(result: Reproduction, *, quick: bool, seed: int, out: Path | None = None) -> Path:
    """Write `<slug>.json` and `<slug>.csv` and return the path of the JSON file."""
    from featherweight.measure.machine import machine

    if out is None:
        root = source_root() or Path.cwd()
        out = root.joinpath(
            *(("runs", "reproductions") if quick else ("benchmarks", "results", "reproductions"))
        )
    command = f"featherweight reproduce {result.slug}{' --quick' if quick else ''} --seed {seed}"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    path = out / f"{result.slug}.json"
    entry = {"date": date, "command": command, "quick": quick, "machine": machine(), **result.to_dict()}
    table = io.StringIO()
    writer = csv.DictWriter(table, list(result.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result.rows)
    atomic_write(path.with_suffix(".csv"), table.getvalue())
    atomic_write_json(path, entry)
    return path


def mean_spread(values: Sequence[float], digits: int = 2) -> str:
    """Write percentages of several seeds as mean ± standard deviation.

    >>> mean_spread([0.70, 0.72])
    '71.00 ± 1.41 %'
    """
    spread = f" ± {100 * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.{digits}f}{spread} %"


def judge(better: Sequence[float], worse: Sequence[float], images: int) -> str:
    """Say whether accuracies `better` (one per seed) really lie above `worse`.

    The claim holds if the mean gain exceeds 1.96 standard errors and no seed contradicts it; it does not
    hold if the same is true the other way round. The error joins the sampling of the test images with the
    spread over seeds.

    >>> judge([0.80, 0.81], [0.70, 0.71], 10_000), judge([0.80], [0.799], 1000), judge([0.7], [0.8], 10_000)
    ('holds', 'inconclusive', 'does not hold')
    """
    gains = [a - b for a, b in zip(better, worse, strict=True)]
    sampling = sum(p * (1 - p) for p in (statistics.fmean(better), statistics.fmean(worse))) / images
    seeds = statistics.variance(gains) / len(gains) if len(gains) > 1 else 0.0
    gain, error = statistics.fmean(gains), math.sqrt(sampling + seeds)
    if gain > 1.96 * error and min(gains) > 0:
        return HOLDS
    return FAILS if gain < -1.96 * error and max(gains) < 0 else OPEN


def overall(verdicts: Sequence[str]) -> str:
    """Join the verdicts of the parts of a claim: all must hold, one failure is a failure."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if all(verdict == HOLDS for verdict in verdicts) else OPEN
