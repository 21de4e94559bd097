"""Measure how right the exported models of a run are on a data set's test split. Torch is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data.sources import load_dataset
from featherweight.errors import DataError
from featherweight.measure.accuracy import wilson_interval
from featherweight.workflows.predict import MODEL_FILES, Predictor, find_model, read_json


def evaluate(
    run_or_onnx: str | Path, data: str | Path, data_root: str | Path | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Measure every exported variant on the test split of `data`.

    Classes are matched by name, so that their order may differ between the model and the data.

    Args:
        run_or_onnx: a run folder of `fit`, or one `.onnx` file.
        data: whatever `load_dataset` reads.
        data_root: folder holding the built-in data sets.
        seed: of the split, where the data brings none; None takes the seed of the run, so that its test
            images are those that training never saw.

    Raises:
        DataError: the data has a class that the model does not know, or no test images.
        CheckpointError: there is no usable model.
    """
    variants = _variants(Path(run_or_onnx))
    folder = find_model(Path(run_or_onnx)).parent
    seed = int(read_json(folder / "config.json").get("seed", 0)) if seed is None else seed
    dataset = load_dataset(data, data_root=data_root, seed=seed)
    if not len(dataset.test):
        raise DataError(f"{data} has no test images. Expected a test split, or enough images to make one.")
    results = {name: _evaluate_one(Predictor(path, threads=0), dataset) for name, path in variants.items()}
    return {
        "run": str(run_or_onnx),
        "data": dataset.name,
        "split": "test",
        "seed": seed,
        "images": len(dataset.test),
        "classes": list(dataset.classes),
        "variants": results,
    }


def _variants(path: Path) -> dict[str, Path]:
    """Return variant name -> model file."""
    if path.is_file():
        return {"int8" if path.name == MODEL_FILES["int8"] else "model": path}
    find_model(path)  # raises when the folder holds none
    files = {name: path / file for name, file in reversed(MODEL_FILES.items())}
    return {name: file for name, file in files.items() if file.is_file()}


def _evaluate_one(predictor: Predictor, dataset: Any) -> dict[str, Any]:
    unknown = sorted(set(dataset.classes) - set(predictor.labels))
    if unknown:
        raise DataError(
            f"{dataset.name} has classes the model does not know: {', '.join(unknown[:5])}. "
            f"The model knows: {', '.join(predictor.labels[:10])}. Use data with the same class names."
        )
    to_model = np.array([predictor.labels.index(name) for name in dataset.classes])
    truth = to_model[np.asarray(dataset.test.labels)]
    guesses = np.array([int(predictor.logits(dataset.test.image(i)).argmax()) for i in range(len(truth))])
    right = int((guesses == truth).sum())
    return {
        "file": predictor.path.name,
        "size_bytes": predictor.path.stat().st_size,
        "test_accuracy": right / len(truth),
        "test_accuracy_interval": [float(bound) for bound in wilson_interval(right, len(truth))],
        "per_class": [
            {"class": name, **_precision_recall(truth == index, guesses == index)}
            for index, name in enumerate(predictor.labels)
        ],
    }


def _precision_recall(truth: np.ndarray, guessed: np.ndarray) -> dict[str, Any]:
    """Precision is None for a class never guessed, recall for one without images: neither is zero nor one."""
    both, images, guesses = (int(mask.sum()) for mask in (truth & guessed, truth, guessed))
    return {
        "precision": both / guesses if guesses else None,
        "recall": both / images if images else None,
        "images": images,
    }
