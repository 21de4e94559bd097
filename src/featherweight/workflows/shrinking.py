"""From the trained network to its two files: float32, and int8 within the accuracy that may be lost.

The order of the steps is the whitepaper's (arXiv:1806.08342, section 5): post-training quantisation first,
fine-tuning with simulated quantisation where that loses too much, float layers where even that is not enough.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from featherweight.export.onnx import export_onnx, run_onnx
from featherweight.measure.accuracy import accuracy
from featherweight.measure.machine import machine
from featherweight.shrink.qat import convert_qat, prepare_qat
from featherweight.shrink.quantize import QuantizeReport, quantize_within
from featherweight.train.loop import fit_model
from featherweight.workflows.budget import Budget
from featherweight.workflows.candidates import Candidate
from featherweight.workflows.delivery import FILES
from featherweight.workflows.training import Task, make_recipe

log = logging.getLogger("featherweight")

_CALIBRATION_IMAGES = 256
_QAT_LEARNING_RATE = 1e-3
_CHECKED_IMAGES = 32


@dataclass(frozen=True)
class Shrunk:
    """How the int8 file was made: validation accuracies by variant, the method and what stayed in float."""

    val_accuracy: dict[str, float]
    method: str
    kept_float: tuple[str, ...]
    params: int
    opset: int
    notes: tuple[str, ...]


class _Job:
    """The images that exporting, calibrating and comparing need, prepared once."""

    def __init__(self, candidate: Candidate, task: Task, folder: Path) -> None:
        self.candidate, self.task, self.folder = candidate, task, folder
        self.spec = task.preprocess(candidate.input)
        count = min(len(task.dataset.train), _CALIBRATION_IMAGES)
        rows = np.random.default_rng(0).permutation(len(task.dataset.train))[:count]
        self.calibration = self._images(task.dataset.train.subset(rows))
        self.val, self.val_labels = self._images(task.dataset.val), task.dataset.val.labels

    def _images(self, split) -> np.ndarray:
        pixels = split.decode(self.spec.size, self.task.mode)
        return np.ascontiguousarray(self.spec.normalize(pixels).transpose(0, 3, 1, 2))

    def export(self, model: nn.Module, path: Path) -> int:
        """Write a network with everything a reader needs; return the opset."""
        return export_onnx(
            model,
            path,
            (self.task.in_chans, *self.spec.size),
            classes=self.task.dataset.classes,
            preprocess_json=self.spec.to_json(),
            images=self.val[:_CHECKED_IMAGES],
        ).opset

    def score(self, path: Path) -> float:
        """Return the validation accuracy of a file in percent."""
        logits = run_onnx(path, self.val, threads=machine()["cores"])
        return 100 * accuracy(logits, self.val_labels)

    def quantize(self, source: Path, target: Path, max_drop: float, keep_layers: bool) -> QuantizeReport:
        """Quantise with the calibration images, scored on the validation split."""
        return quantize_within(
            source, target, self.calibration, self.score, max_drop, keep_layers=keep_layers
        )


def shrink(
    model: nn.Module, candidate: Candidate, task: Task, budget: Budget, folder: Path, fine_tune_s: float
) -> Shrunk:
    """Write `model.onnx` and `model.int8.onnx` into the run folder.

    Args:
        model: the trained network, in eval mode.
        candidate: what the network is.
        task: the data.
        budget: `max_drop` bounds the loss in percentage points of validation accuracy.
        folder: the run folder.
        fine_tune_s: wall time in seconds for fine-tuning with simulated quantisation, where it is needed.
    """
    job = _Job(candidate, task, folder)
    float_path, int8_path = folder / FILES["float32"], folder / FILES["int8"]
    opset = job.export(model, float_path)
    report = job.quantize(float_path, int8_path, budget.max_drop, keep_layers=False)
    method, notes = f"post-training, {report.method} ranges", []
    float_score = report.float_score
    if not report.within:
        notes.append(
            f"Post-training int8 lost {float_score - report.score:.2f} points of validation accuracy, "
            f"more than the {budget.max_drop:g} allowed; the weights were fine-tuned "
            "with simulated quantisation."
        )
        log.info("%s", notes[-1])
        report = _fine_tune(model, job, float_score - budget.max_drop, int8_path, fine_tune_s)
        method = "quantisation-aware fine-tuning"
    if report.score < float_score - budget.max_drop:
        # On a small set fine-tuning may cost more than it mends; float layers of the first network help then.
        report = job.quantize(float_path, int8_path, budget.max_drop, keep_layers=True)
        method = f"post-training, {report.method} ranges, sensitive layers in float"
    if report.kept_float:
        notes.append(f"Kept in float as too sensitive: {', '.join(report.kept_float)}.")
    if report.score < float_score - budget.max_drop:
        notes.append(f"int8 still loses {float_score - report.score:.2f} points of validation accuracy.")
    for note in notes[1:]:
        log.info("%s", note)
    return Shrunk(
        val_accuracy={"float32": float_score / 100, "int8": report.score / 100},
        method=method,
        kept_float=report.kept_float,
        params=sum(parameter.numel() for parameter in model.parameters()),
        opset=opset,
        notes=tuple(notes),
    )


def _fine_tune(model: nn.Module, job: _Job, wanted: float, int8_path: Path, time_s: float) -> QuantizeReport:
    """Fine-tune with simulated quantisation, then quantise again, keeping float layers if needed."""
    network = prepare_qat(model)
    task, candidate = job.task, job.candidate
    base = make_recipe(candidate, task, time_budget_s=time_s)
    # Averaged weights quantise differently from the weights, so none are kept (whitepaper, section 5.2).
    recipe = dataclasses.replace(
        base, lr=min(base.lr, _QAT_LEARNING_RATE), ema_decay=None, mixup=0.0, cutmix=0.0, bf16=False
    )
    fit_model(
        network,
        task.arrays(task.dataset.train, candidate.input),
        task.arrays(task.dataset.val, candidate.input),
        recipe,
        task.augment,
        job.folder / "qat",
    )
    tuned = job.folder / "qat" / "model.onnx"
    job.export(convert_qat(network), tuned)
    tuned_score = job.score(tuned)
    return job.quantize(tuned, int8_path, tuned_score - wanted, keep_layers=True)
