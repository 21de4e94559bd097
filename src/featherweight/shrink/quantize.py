"""Post-training quantisation of an ONNX file to int8.

Weights become symmetric int8 with one scale per output channel, activations affine uint8 with one scale per
tensor, biases int32 (the whitepaper's recommended post-training scheme). The file keeps the QDQ form, which
every engine reads; onnxruntime turns it into integer convolutions when it loads it. ReLU and clipping vanish
into the range of the convolution before them. Affine uint8 is also the fastest choice on x86.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import DataError, UsageError, close_matches
from featherweight.files import atomic_write
from featherweight.shrink.calibrate import METHODS, Ranges, calibrate
from featherweight.shrink.compact import compact

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("featherweight")

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# A norm that no convolution could take in has no integer kernel; rounding its weights only loses accuracy.
NORMS = ("BatchNormalization", "InstanceNormalization", "LayerNormalization")


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantise.

    `activation` "uint8" or "int8" (both affine, equally quick on x86 with VNNI). `method` is one of
    `calibrate.METHODS`. `reduce_range` uses 7-bit weights, which only processors without VNNI need against
    overflow in 16-bit sums.
    """

    activation: str = "uint8"
    method: str = "minmax"
    reduce_range: bool = False


@dataclass(frozen=True)
class LayerScore:
    """How much worse the network gets (in `sensitivity`'s unit) when only the layer `name` is quantised."""

    name: str
    loss: float


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_within` wrote: the scores of both files, and which layers stayed in float."""

    path: Path
    method: str
    score: float
    float_score: float
    kept_float: tuple[str, ...]
    within: bool


def _load(path: str | Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(onnx.load(path))
    except Exception as error:
        raise DataError(f"Cannot read {path} as an ONNX file: {str(error).splitlines()[0]}") from error


def quantizable_layers(path: str | Path) -> list[str]:
    """Return the names of the convolutions and linear layers of an ONNX file, in order."""
    return _layers(_load(path))


def _layers(proto: onnx.ModelProto) -> list[str]:
    weights = {t.name for t in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in LAYERS]
    return [node.name for node in nodes if any(name in weights for name in node.input[1:2])]


def _quantize(
    proto: onnx.ModelProto, ranges: Ranges, keep_float: Collection[str], config: QuantizeConfig
) -> onnx.ModelProto:
    """Return the quantised form of `proto`, which is left alone."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    source = onnx.ModelProto()
    source.CopyFrom(proto)
    known = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        source,
        per_channel=True,
        reduce_range=config.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if config.activation == "int8" else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, known),
        nodes_to_quantize=[],
        nodes_to_exclude=list(keep_float),
        op_types_to_quantize=[kind for kind in (*QDQRegistry, *QLinearOpsRegistry) if kind not in NORMS],
        extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantizer.model.topological_sort()
    return compact(quantizer.model.model)


def _check(proto: onnx.ModelProto, keep_float: Collection[str], config: QuantizeConfig) -> None:
    if config.activation not in ("uint8", "int8"):
        raise UsageError(f"Activation type '{config.activation}' is unknown; expected uint8 or int8.")
    layers = _layers(proto)
    for name in keep_float:
        if name not in layers:
            raise UsageError(f"No layer '{name}' to keep in float.{close_matches(name, layers)}")


def quantize_onnx(
    float_path: str | Path,
    int8_path: str | Path,
    calibration: np.ndarray,
    *,
    keep_float: Collection[str] = (),
    config: QuantizeConfig | None = None,
    ranges: Ranges | None = None,
) -> Path:
    """Quantise `float_path` into `int8_path` and return the latter; the metadata travel along.

    Args:
        float_path: an ONNX file with folded batch norms.
        int8_path: the file to write.
        calibration: preprocessed images `(N, C, H, W)`, about 100 to 500 from the training split.
        keep_float: names of layers (see `quantizable_layers`) to leave in float.
        config: number formats and calibration rule.
        ranges: activation ranges by tensor name, found before; `calibration` is then not used.

    Raises:
        DataError: `float_path` is no ONNX file.
        UsageError: an unknown layer, number format or calibration rule.
    """
    config = config or QuantizeConfig()
    proto = _load(float_path)
    _check(proto, keep_float, config)
    if ranges is None:
        ranges = calibrate(proto, calibration, config.method)
    atomic_write(Path(int8_path), _quantize(proto, ranges, keep_float, config).SerializeToString())
    return Path(int8_path)


def _run(proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {proto.graph.input[0].name: images.astype(np.float32)})[0]


def sensitivity(
    float_path: str | Path,
    calibration: np.ndarray,
    evaluate: Callable[[Path], float] | None = None,
    config: QuantizeConfig | None = None,
) -> list[LayerScore]:
    """Quantise one layer at a time and return the layers, the one that hurts most first.

    Args:
        float_path: the float ONNX file.
        calibration: preprocessed images `(N, C, H, W)`.
        evaluate: returns a file's score (higher is better); the loss is then the drop of it. Without it the
        loss is
            the mean squared change of the outputs on the first 64 images over their mean square: quick and
            ranks well.
        config: number formats and calibration rule.
    """
    config = config or QuantizeConfig()
    proto = _load(float_path)
    ranges = calibrate(proto, calibration, config.method)
    layers = _layers(proto)
    images = calibration[:64]
    expected = _run(proto, images)
    reference = evaluate(Path(float_path)) if evaluate else 0.0
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        for name in layers:
            single = _quantize(proto, ranges, [other for other in layers if other != name], config)
            if evaluate:
                trial = Path(folder) / "trial.onnx"
                trial.write_bytes(single.SerializeToString())
                loss = reference - evaluate(trial)
            else:
                loss = float(np.square(_run(single, images) - expected).mean() / np.square(expected).mean())
            scores.append(LayerScore(name, loss))
    return sorted(scores, key=lambda score: -score.loss)


def quantize_within(
    float_path: str | Path,
    int8_path: str | Path,
    calibration: np.ndarray,
    score: Callable[[Path], float],
    max_drop: float,
    *,
    methods: Collection[str] = METHODS,
    keep_layers: bool = True,
) -> QuantizeReport:
    """Quantise such that `score` drops by at most `max_drop`, with as few float layers as it takes.

    Every calibration rule is tried and the best one written. If that is still too low and `keep_layers` is
    set, the most sensitive layers stay in float: 1, 2, 4, ... of them until the score is reached. The best
    file found is written in any case.

    Args:
        float_path: the float ONNX file.
        int8_path: the file to write.
        calibration: preprocessed images `(N, C, H, W)`.
        score: returns a file's score, e.g. validation accuracy in percent; higher is better.
        max_drop: in the unit of `score`.
        methods: calibration rules to try, see `calibrate.METHODS`.
        keep_layers: whether layers may stay in float.
    """
    int8_path, float_score = Path(int8_path), score(Path(float_path))
    best: tuple[float, QuantizeConfig, bytes] | None = None
    for method in methods:
        config = replace(QuantizeConfig(), method=method)
        quantize_onnx(float_path, int8_path, calibration, config=config)
        reached = score(int8_path)
        logger.debug("calibration %s: score %.4f of %.4f", method, reached, float_score)
        if best is None or reached > best[0]:
            best = reached, config, int8_path.read_bytes()
    if best is None:
        raise UsageError(f"No calibration method given; choose from: {', '.join(METHODS)}.")
    reached, config, content = best
    kept: tuple[str, ...] = ()
    if keep_layers and reached < float_score - max_drop:
        order = [item.name for item in sensitivity(float_path, calibration, config=config)]
        ranges = calibrate(float_path, calibration, config.method)
        count = 1
        while reached < float_score - max_drop and len(kept) < len(order):
            trial = tuple(order[:count])
            quantize_onnx(float_path, int8_path, calibration, keep_float=trial, config=config, ranges=ranges)
            if (score_now := score(int8_path)) > reached:
                reached, content = score_now, int8_path.read_bytes()
            kept, count = trial, count * 2
    atomic_write(int8_path, content)
    within = reached >= float_score - max_drop
    return QuantizeReport(int8_path, config.method, reached, float_score, kept, within)
