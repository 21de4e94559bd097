"""The end of the main job: measure the exported files on the test split, write what the user keeps."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.data.preprocess import Preprocess
from featherweight.data.sources import Split
from featherweight.export.onnx import run_onnx
from featherweight.files import atomic_write, atomic_write_json
from featherweight.measure.accuracy import per_class, wilson_interval, worst_mistakes
from featherweight.measure.count import count_onnx
from featherweight.measure.latency import measure_latency
from featherweight.measure.machine import machine
from featherweight.measure.memory import peak_memory_bytes
from featherweight.report.content import CamExample, CandidatePoint, Mistake, VariantResult
from featherweight.report.gradcam import grad_cam, overlay
from featherweight.workflows.budget import Budget
from featherweight.workflows.candidates import Candidate
from featherweight.workflows.screening import Screened

FILES = {"float32": "model.onnx", "int8": "model.int8.onnx"}
"""Variant -> the file of the run folder that holds it."""

_EXAMPLES = 12
_CAMS = 6


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the deployed file answers on the test split: logits (N, K) and labels (N,)."""

    logits: np.ndarray
    labels: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class of each image."""
        return self.logits.argmax(1)


def measure_variant(
    path: Path, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], params: int
) -> tuple[VariantResult, Answers]:
    """Measure one exported file: accuracy with its interval, latency, memory, size and MACs.

    Args:
        path: the ONNX file.
        images: preprocessed test images (N, C, H, W).
        labels: their classes (N,).
        classes: class names.
        params: parameters of the network as trained.
    """
    threads = machine()["cores"]
    answers = Answers(run_onnx(path, images, threads=threads), labels)
    correct = int((answers.predicted == labels).sum())
    counted = count_onnx(path)
    timed = [measure_latency(path, threads=number) for number in sorted({1, threads})]
    scores = per_class(labels, answers.predicted, classes)
    result = VariantResult(
        test_accuracy=correct / len(labels),
        test_accuracy_interval=wilson_interval(correct, len(labels)),
        latency_ms=[{"p50": one.p50_ms, "p95": one.p95_ms, "threads": one.threads} for one in timed],
        size_bytes=counted.size_bytes,
        macs=counted.macs,
        params=params,
        peak_memory_bytes=peak_memory_bytes(path),
        per_class=[dataclasses.asdict(score) for score in scores],
    )
    return result, answers


def variant_metrics(result: VariantResult) -> dict[str, Any]:
    """Return one variant as it stands in `metrics.json`.

    `latency_ms` is onnxruntime's at one thread; `compiled` is None where the file was not compiled.
    """
    single, *rest = result.latency_ms
    return {
        "test_accuracy": result.test_accuracy,
        "test_accuracy_interval": list(result.test_accuracy_interval),
        "latency_ms": dict(single),
        "latency_ms_all_threads": dict(rest[-1] if rest else single),
        "size_bytes": result.size_bytes,
        "macs": result.macs,
        "params": result.params,
        "peak_memory_bytes": result.peak_memory_bytes,
        "per_class": [dict(row) for row in result.per_class],
        "compiled": result.engine,
    }


def budget_violations(result: VariantResult, budget: Budget) -> list[str]:
    """Return the limits that one measured variant breaks."""
    latency_ms = result.single_thread_ms
    return budget.violations(latency_ms["p50"] if latency_ms else 0.0, result.size_bytes, result.macs)


def choose_variant(
    variants: Mapping[str, VariantResult], budget: Budget, val_accuracy: Mapping[str, float]
) -> str:
    """Return the variant to deploy.

    Those within the budget come first; among them int8, unless it loses more than `max_drop` points of
    validation accuracy or is both slower than float32 and not asked for by a size limit.
    """

    def rank(name: str) -> tuple[bool, bool, bool]:
        result = variants[name]
        drop = 100 * (val_accuracy["float32"] - val_accuracy[name])
        slower = budget.max_size_bytes is None and _p50(result) > _p50(variants["float32"])
        return bool(budget_violations(result, budget)), drop > budget.max_drop, slower

    return min(("int8", "float32"), key=rank)


def _p50(result: VariantResult) -> float:
    single = result.single_thread_ms
    return single["p50"] if single else 0.0


def candidate_points(
    screened: Sequence[Screened], trials: Sequence[Mapping[str, Any]], winner: Candidate
) -> list[CandidatePoint]:
    """Return every candidate as the report shows it, with the accuracy of its last trial where it had one."""
    last = {trial["label"]: trial for trial in trials}
    points = []
    for entry in screened:
        candidate, trial = entry.candidate, last.get(entry.candidate.label)
        chosen = candidate == winner
        points.append(
            CandidatePoint(
                name=candidate.model,
                width=candidate.width,
                input=candidate.input,
                macs=entry.macs,
                params=entry.params,
                size_bytes=entry.size_bytes,
                latency_ms=entry.latency_ms or math.nan,
                accuracy=trial["val_accuracy"] if trial else None,
                verdict=entry.dropped or ("chosen" if chosen else "beaten in the search"),
                chosen=chosen,
                dropped=bool(entry.dropped),
                epochs=trial["epochs"] if trial else None,
            )
        )
    return points


def pick_mistakes(split: Split, answers: Answers, classes: Sequence[str]) -> list[Mistake]:
    """Return the wrong answers that the model was surest of."""
    chance = torch.from_numpy(answers.logits).softmax(1).numpy()
    return [
        Mistake(
            split.image(i).convert("RGB"),
            classes[int(answers.labels[i])],
            classes[int(answers.predicted[i])],
            float(chance[i].max()),
        )
        for i in worst_mistakes(answers.logits, answers.labels, _EXAMPLES)
    ]


def pick_cams(
    model: nn.Module, split: Split, images: np.ndarray, answers: Answers, classes: Sequence[str]
) -> list[CamExample]:
    """Return Grad-CAM overlays of test images spread over the classes."""
    rows = [int(np.flatnonzero(answers.labels == label)[0]) for label in np.unique(answers.labels)]
    rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(_CAMS, len(rows)))]
    cams = grad_cam(model, torch.from_numpy(images[rows]), class_index=answers.predicted[rows].tolist())
    examples = []
    for row, cam in zip(rows, cams, strict=True):
        image = split.image(row).convert("RGB")
        true, predicted = classes[int(answers.labels[row])], classes[int(answers.predicted[row])]
        examples.append(CamExample(image, overlay(image, cam), true, predicted))
    return examples


def write_sidecars(
    run_dir: Path, preprocess: Preprocess, classes: Sequence[str], metrics: Mapping[str, Any]
) -> None:
    """Write `preprocess.json`, `labels.txt` and `metrics.json` beside the models."""
    atomic_write(run_dir / "preprocess.json", preprocess.to_json() + "\n")
    atomic_write(run_dir / "labels.txt", "".join(f"{name}\n" for name in classes))
    atomic_write_json(run_dir / "metrics.json", metrics)


def provenance() -> dict[str, str]:
    """Return when and with which version a run was made."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "created": now.isoformat(timespec="seconds"),
        "version": importlib.metadata.version("featherweight"),
    }
