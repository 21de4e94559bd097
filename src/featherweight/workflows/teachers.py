"""Teachers for distillation: an earlier run, or one of timm's networks with its published weights."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from featherweight.data.preprocess import Preprocess
from featherweight.errors import DataError, UsageError
from featherweight.registry import create_model
from featherweight.train.distill import ResizedTeacher
from featherweight.weights import load_checkpoint
from featherweight.workflows.candidates import Candidate
from featherweight.workflows.training import Task

WEIGHTS = "train/model.safetensors"


def load_teacher(spec: str, task: Task) -> nn.Module:
    """Return a teacher that reads the student's batches, whatever the student's input size.

    Args:
        spec: run folder of an earlier `fit` on the same classes, or `timm/NAME` with the task's
            classes.
        task: the student's data.

    Raises:
        UsageError: neither a run folder nor a `timm/` name, or the number of classes differs.
        DataError: the run's classes are others.
    """
    if spec.startswith("timm/"):
        return _timm_teacher(spec, task)
    run = Path(spec)
    if not (run / "metrics.json").exists():
        raise UsageError(f"--teacher {spec} is neither a finished run folder nor a timm/NAME.")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    own = Preprocess.from_json((run / "preprocess.json").read_text(encoding="utf-8"))
    labels = tuple((run / "labels.txt").read_text(encoding="utf-8").splitlines())
    if labels != task.dataset.classes or own.channels != task.in_chans:
        raise DataError(
            f"The teacher in {run} knows other classes ({', '.join(labels[:5])} …) or other channels."
        )
    network = Candidate(**metrics["candidate"]).build(task.num_classes, task.in_chans)
    load_checkpoint(network, run / WEIGHTS)
    return ResizedTeacher(network.eval(), own.size, task.mean, task.std, own.mean, own.std)


def _timm_teacher(spec: str, task: Task) -> nn.Module:
    network = create_model(spec, pretrained=True, in_chans=task.in_chans).eval()
    config = network.pretrained_cfg
    if network.num_classes != task.num_classes:
        raise UsageError(
            f"{spec} knows {network.num_classes} classes, the data {task.num_classes}. "
            "Fit it to the data first and give that run folder as --teacher."
        )
    mean, std = config["mean"][: task.in_chans], config["std"][: task.in_chans]
    return ResizedTeacher(network, tuple(config["input_size"][-2:]), task.mean, task.std, mean, std)
