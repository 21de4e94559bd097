"""Write a network as one self-contained ONNX file, and run such a file without PyTorch.

The file takes a float32 batch `image` of `(N, C, H, W)`, any N (any H and W too where asked for), and gives
`logits`, `restored` where an image comes out. Batch norms are folded into the convolutions before them,
weights lie inside the file, and the preprocessing specification and the class names travel in its metadata.
Nothing is written under the final name until onnxruntime's answers match PyTorch's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import DataError, FeatherweightError, MissingExtraError
from featherweight.files import atomic_write

if TYPE_CHECKING:
    import onnx
    import onnxruntime
    import torch

logger = logging.getLogger("featherweight")

PREPROCESS_KEY = "featherweight.preprocess"
LABELS_KEY = "featherweight.labels"
INPUT_NAME, OUTPUT_NAME = "image", "logits"
RESTORED_NAME = "restored"
"""Name of the output where it is an image."""

OPEN_AXES = {0: "batch", 2: "height", 3: "width"}
MAX_RELATIVE_ERROR = 1e-4


@dataclass(frozen=True)
class ExportReport:
    """What was written; `max_relative_error` is the largest gap to PyTorch over the largest output."""

    path: Path
    size_bytes: int
    opset: int
    exporter: str
    max_relative_error: float


def check_available() -> None:
    """Pass if ONNX files can be written and run here.

    Raises:
        MissingExtraError: one of onnx, onnxscript, onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"ONNX export needs '{name}', which is not installed. Run: pip install {name}"
            )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hold back the exporters' warnings, log lines and progress text."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [log.level for log in noisy]
    for log in noisy:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(noisy, levels, strict=True):
            log.setLevel(level)


def _export_traced(
    model: torch.nn.Module, example: torch.Tensor, opset: int, dynamic_size: bool
) -> onnx.ModelProto:
    """Export through tracing: 0.2 s for a small network, where the graph exporter needs 2 to 6 s."""
    import onnx
    import torch

    buffer = io.BytesIO()
    output = RESTORED_NAME if dynamic_size else OUTPUT_NAME
    scaled = {axis: f"restored_{name}" if axis else name for axis, name in OPEN_AXES.items()}
    axes: dict[str, dict[int, str]] = {INPUT_NAME: {0: "batch"}, output: {0: "batch"}}
    if dynamic_size:
        axes = {INPUT_NAME: OPEN_AXES, output: scaled}
    names: dict[str, Any] = {"input_names": [INPUT_NAME], "output_names": [output]}
    torch.onnx.export(
        model, (example,), buffer, dynamo=False, opset_version=opset, dynamic_axes=axes, **names
    )
    return onnx.load_from_string(buffer.getvalue())


def _export_graph(
    model: torch.nn.Module, example: torch.Tensor, opset: int, dynamic_size: bool
) -> onnx.ModelProto:
    """Export through `torch.export`, which keeps data-independent control flow that tracing would freeze."""
    import torch

    axes = OPEN_AXES if dynamic_size else {0: OPEN_AXES[0]}
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT_NAME],
        output_names=[RESTORED_NAME if dynamic_size else OUTPUT_NAME],
        dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in axes.items()},),
        verbose=False,
    )
    return program.model_proto


EXPORTERS = {"traced": _export_traced, "graph": _export_graph}


def _clean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, drop identities and everything that only documents the export."""
    import onnxscript.optimizer

    proto = onnxscript.optimizer.optimize(proto)
    proto.producer_name, proto.producer_version, proto.doc_string = "featherweight", "", ""
    del proto.metadata_props[:]
    del proto.graph.value_info[:]
    proto.graph.doc_string = ""
    for item in [*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output]:
        item.doc_string = ""
        del item.metadata_props[:]
    return proto


def _max_relative_error(data: bytes, images: torch.Tensor, expected: torch.Tensor) -> float:
    """Compare onnxruntime with PyTorch's answers on the whole batch and on its first image alone."""
    session = _session(data, threads=1)
    worst, scale = 0.0, max(float(expected.abs().max()), 1e-12)
    for n in {1, len(images)}:
        answer = session.run(None, {INPUT_NAME: images[:n].numpy()})[0]
        if answer.shape != tuple(expected[:n].shape):
            return float("inf")
        worst = max(worst, float(np.abs(answer - expected[:n].numpy()).max()) / scale)
    # A NaN compares false with everything, so it must not pass as small.
    return worst if np.isfinite(worst) else float("inf")


def export_onnx(
    model: torch.nn.Module,
    path: str | Path,
    input_size: tuple[int, int, int],
    *,
    opset: int = 18,
    classes: Sequence[str] | None = None,
    preprocess_json: str | None = None,
    metadata: Mapping[str, str] | None = None,
    images: np.ndarray | None = None,
    exporter: str = "auto",
    check: bool = True,
    dynamic_size: bool = False,
) -> ExportReport:
    """Write `model` to `path` as ONNX and check the file against PyTorch.

    Args:
        model: a network of one image batch `(N, C, H, W)`; left untouched, exported as in eval mode.
        path: the file to write; replaced only when the check passes.
        input_size: `(C, H, W)` in pixels.
        opset: ONNX operator set.
        classes: class names in the order of the logits, put into the metadata.
        preprocess_json: the preprocessing specification, put into the metadata.
        metadata: further metadata entries.
        images: real, preprocessed images `(N, C, H, W)` to compare on; noise without them.
        exporter: "traced" (quick), "graph" (`torch.export`), or "auto": traced, and graph where that fails.
        check: compare with PyTorch; only a latency search over random weights may skip it.
        dynamic_size: leave height and width open, for networks that give an image; the check then
            takes two sizes, and the output is `restored`.

    Raises:
        FeatherweightError: no exporter gives a file that agrees with PyTorch to 1e-4 of the largest output.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    import torch

    check_available()
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    example = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    sample = example if images is None else torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    samples = [sample, _other_size(sample, model)] if dynamic_size else [sample]
    with torch.no_grad():
        pairs = [(images, model(images)) for images in samples]
    failures = []
    for name in ["traced", "graph"] if exporter == "auto" else [exporter]:
        try:
            with _silence(), torch.no_grad():
                proto = _clean(EXPORTERS[name](model, example, opset, dynamic_size))
            _describe(proto, classes, preprocess_json, metadata)
            data = proto.SerializeToString()
            errors = [_max_relative_error(data, *pair) for pair in pairs] if check else [float("nan")]
            error = max(errors)
        except Exception as problem:
            logger.debug("exporter %s failed", name, exc_info=True)
            failures.append(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[:1]}")
            continue
        if error > MAX_RELATIVE_ERROR:
            failures.append(
                f"{name}: outputs differ by {error:.2g} of the largest, limit {MAX_RELATIVE_ERROR:g}"
            )
            continue
        atomic_write(path, data)
        return ExportReport(path, len(data), proto.opset_import[0].version, name, error)
    raise FeatherweightError(f"Could not export {type(model).__name__} to ONNX ({'; '.join(failures)}).")


def _other_size(sample: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Return the batch cut to another height and width, odd ones unless the network has a stride.

    A network with a stride may cut images of other sizes up, which an open graph cannot.
    """
    step = getattr(model, "stride", 1)
    height, width = (
        max(step, side - count * step) for side, count in zip(sample.shape[2:], (3, 5), strict=True)
    )
    return sample[..., :height, :width].contiguous()


def _describe(
    proto: onnx.ModelProto,
    classes: Sequence[str] | None,
    preprocess_json: str | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Put class names, preprocessing and further entries into the file's metadata."""
    entries = dict(metadata or {})
    if classes is not None:
        entries[LABELS_KEY] = json.dumps(list(classes), ensure_ascii=False)
    if preprocess_json is not None:
        entries[PREPROCESS_KEY] = preprocess_json
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)


def _session(source: str | Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    source = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def open_session(source: str | Path | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """Load an ONNX file, or its content, for the CPU with `threads` threads.

    Raises:
        DataError: the file is missing or onnxruntime refuses it.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise DataError(
            f"No ONNX file at {source}; expected one written by featherweight, e.g. runs/NAME/model.onnx."
        )
    try:
        return _session(source, threads)
    except Exception as error:
        name = "a network" if isinstance(source, bytes) else source
        raise DataError(f"onnxruntime cannot load {name}: {str(error).splitlines()[0]}") from error


def run_onnx(path: str | Path, x: np.ndarray, threads: int = 1, batch: int = 256) -> np.ndarray:
    """Run the file on `x` `(N, C, H, W)`, at most `batch` images at a time, and return its first output.

    Raises:
        DataError: the file cannot be loaded.
    """
    session = open_session(path, threads)
    name = session.get_inputs()[0].name
    x = np.ascontiguousarray(x, dtype=np.float32)
    parts = [session.run(None, {name: x[i : i + batch]})[0] for i in range(0, len(x), batch)]
    return np.concatenate(parts) if parts else np.empty((0,), np.float32)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of an ONNX file; class names come back as a list.

    Raises:
        DataError: the file cannot be loaded.
    """
    entries: dict[str, Any] = dict(open_session(path).get_modelmeta().custom_metadata_map)
    if LABELS_KEY in entries:
        entries[LABELS_KEY] = json.loads(entries[LABELS_KEY])
    return entries
