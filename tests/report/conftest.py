"""A small made-up run that exercises every section of the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from featherweight.report.content import CamExample, CandidatePoint, Mistake, RunReport, VariantResult

HOSTILE = '<script>alert("x")</script>'


def _candidates() -> list[CandidatePoint]:
    accuracies = [0.70, 0.80, 0.75, 0.90, None, None]
    return [
        CandidatePoint(
            name=f"net{index}",
            width=0.5,
            input=32,
            macs=1_000_000,
            params=20_000,
            size_bytes=80_000,
            latency_ms=0.1 * (index + 1),
            accuracy=accuracy,
            verdict="over budget: 0.6 ms > 0.5 ms" if accuracy is None else "kept",
            chosen=index == 3,
            dropped=index == 2,
        )
        for index, accuracy in enumerate(accuracies)
    ]


def _variant(size_bytes: int, names: list[str]) -> VariantResult:
    rows = [{"name": name, "precision": 0.9, "recall": None, "support": 10} for name in names]
    timed = [{"p50": 0.2, "p95": 0.3, "threads": 1}, {"p50": 0.15, "p95": 0.4, "threads": 2}]
    return VariantResult(0.9, (0.88, 0.92), timed, size_bytes, 1_000_000, 20_000, 41_000_000, rows)


@pytest.fixture
def make_run() -> Callable[..., RunReport]:
    """Return a builder of a run with the given number of classes, two of them with hostile names."""

    def make(count: int = 4, **changes: object) -> RunReport:
        names = [HOSTILE, 'a|b & "c" $x^2$ 日本', *(f"class {index}" for index in range(2, count))][:count]
        picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
        fields = {
            "title": "Tiny run",
            "command": "featherweight fit digits --max-latency 0.5ms",
            "classes": names,
            "variants": {"float32": _variant(80_000, names), "int8": _variant(30_000, names)},
            "dataset": {"name": "digits", "images": 100},
            "budget": {"max_latency_ms": 0.5, "max_macs": None},
            "candidates": _candidates(),
            "history": [
                {"epoch": e, "train_loss": 1 / e, "val_accuracy": e / 10, "lr": 0.1} for e in range(1, 6)
            ],
            "confusion": np.eye(count, dtype=np.int64) * 9 + np.eye(count, k=1, dtype=np.int64),
            "mistakes": [Mistake(picture, names[0], names[1], 0.9)],
            "gradcams": [CamExample(picture, picture, names[0], names[0])],
            "steps_s": {"search": 12.0, "train": 60.0},
            "machine": {"processor": "Example"},
            "preprocess": {"size": [8, 8], "mode": "L"},
            "warnings": ["3 duplicates"],
            "notes": ["int8 is slower here"],
        }
        return RunReport(**(fields | changes))

    return make
