"""Classify images with an exported model: numpy, Pillow and one engine only, torch is never imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data.images import open_image
from featherweight.data.preprocess import Preprocess
from featherweight.errors import CheckpointError, DataError, MissingExtraError, UsageError

MODEL_FILES = {"int8": "model.int8.onnx", "float32": "model.onnx"}
"""Variant -> its file in a run folder, in the order of preference."""

ENGINES = ("onnxruntime", "compiled")
COMPILED_FOLDER = "compiled"
"""Folder of a run with one compiled network for each variant."""

PREPROCESS_KEY = "featherweight.preprocess"
LABELS_KEY = "featherweight.labels"


@dataclass(frozen=True)
class Prediction:
    """One image and its most likely classes, as (name, probability) from the likeliest down."""

    path: str
    top: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that `--json` prints."""
        return {
            "image": self.path,
            "top": [{"class": name, "probability": round(share, 6)} for name, share in self.top],
        }


class Predictor:
    """An exported classifier with its preprocessing and class names.

    Args:
        run_or_onnx: a run folder of `fit` (its chosen variant is taken) or an `.onnx` file.
        threads: threads of onnxruntime.
        engine: `"onnxruntime"`, or `"compiled"` for the library that `fit` compiled from the same file, which
            runs on one thread.

    Raises:
        CheckpointError: there is no model, it cannot be loaded, or it carries no preprocessing.
        MissingExtraError: onnxruntime is not installed.
        UsageError: the engine is unknown.
    """

    def __init__(self, run_or_onnx: str | Path, threads: int = 1, engine: str = "onnxruntime") -> None:
        if engine not in ENGINES:
            raise UsageError(f"Engine '{engine}' is unknown. Expected one of {', '.join(ENGINES)}.")
        self.path = find_model(Path(run_or_onnx))
        metadata: Mapping[str, str] = {}
        if engine == "compiled":
            self._session = _open_compiled(self.path)
        else:
            self._session = _open_session(self.path, threads)
            metadata = self._session.get_modelmeta().custom_metadata_map
        self._input = self._session.get_inputs()[0].name
        self.preprocess = Preprocess.from_json(
            metadata.get(PREPROCESS_KEY) or _read_beside(self.path, "preprocess.json")
        )
        stored = metadata.get(LABELS_KEY)
        names = json.loads(stored) if stored else _read_beside(self.path, "labels.txt").splitlines()
        self.labels: tuple[str, ...] = tuple(names)

    def logits(self, image: Any) -> np.ndarray:
        """Return the float32 logits `(classes,)` of one image: a path, bytes, an array or a Pillow image.

        Raises:
            DataError: the image cannot be read.
        """
        batch = self.preprocess.apply(open_image(image))[None]
        return self._session.run(None, {self._input: batch})[0][0]

    def predict(self, images: Iterable[str | Path], top: int = 3) -> Iterator[Prediction]:
        """Yield a prediction for each readable image, one after another.

        Raises:
            DataError: at the end, when some images could not be read; the message names them.
        """
        failures = []
        for path in images:
            try:
                shares = softmax(self.logits(path))
            except DataError as error:
                failures.append(str(error))
                continue
            order = np.argsort(-shares, kind="stable")[:top]
            yield Prediction(str(path), tuple((self.labels[i], float(shares[i])) for i in order))
        if failures:
            raise DataError("; ".join(failures))


def predict(
    run_or_onnx: str | Path, images: Iterable[str | Path], top: int = 3, engine: str = "onnxruntime"
) -> list[Prediction]:
    """Classify image files with an exported model.

    Args:
        run_or_onnx: a run folder of `fit`, or an `.onnx` file.
        images: image files.
        top: how many classes to give for each image.
        engine: `"onnxruntime"` or `"compiled"`.

    Raises:
        DataError: an image cannot be read.
        CheckpointError: there is no usable model.
        UsageError: the engine is unknown.
    """
    return list(Predictor(run_or_onnx, engine=engine).predict(images, top))


def find_model(path: Path) -> Path:
    """Return the model file of a run folder: the chosen variant, else int8, else float32.

    Raises:
        CheckpointError: the folder or file does not exist, or the folder holds no model.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"No run folder or model at {path}. Expected what `featherweight fit` wrote.")
    chosen = read_json(path / "metrics.json").get("chosen", "")
    for name in (MODEL_FILES.get(chosen, chosen or "model.int8.onnx"), *MODEL_FILES.values()):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no {' or '.join(MODEL_FILES.values())}. Has `featherweight fit` finished?"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one where the file does not exist.

    Raises:
        CheckpointError: the file is not readable or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Run `featherweight fit` again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Run `featherweight fit` again.")
    return content


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities over the last axis.

    >>> softmax(np.array([0.0, 0.0])).tolist()
    [0.5, 0.5]
    """
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _open_compiled(model: Path) -> Any:
    """Load the compiled form of a run's model file."""
    from featherweight.compiler.session import Session

    variant = {name: variant for variant, name in MODEL_FILES.items()}.get(model.name, model.stem)
    folder = model.parent / COMPILED_FOLDER / variant
    try:
        return Session(folder)
    except DataError as error:
        raise CheckpointError(
            f"{model} has no compiled engine. {error} Make one: featherweight compile {model} --out {folder}"
        ) from error


def _open_session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "Prediction needs onnxruntime. Install it: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise CheckpointError(f"{path} is not a usable ONNX model: {error}") from error


def _read_beside(model: Path, name: str) -> str:
    try:
        return (model.parent / name).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{model} carries no featherweight metadata and there is no {name} beside it. "
            "Expected a model that `featherweight fit` or export_onnx wrote."
        ) from error
