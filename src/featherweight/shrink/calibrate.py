"""Find the range of every activation of an ONNX file on calibration images.

Four rules, cheapest first: the true minimum and maximum; a moving average of each batch's (the whitepaper's);
a percentile, which ignores rare outliers; and the range of least squared quantisation error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import UsageError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

METHODS = ("minmax", "moving", "percentile", "mse")
Ranges = dict[str, tuple[float, float]]

BINS = 2048
BATCH = 16
DECAY = 0.9
OUTLIERS = 1e-4


def _open_all(proto: onnx.ModelProto) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """Open the model with every float activation as an output."""
    import onnx
    import onnxruntime

    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    typed = onnx.shape_inference.infer_shapes(wide)
    values = [*typed.graph.value_info, *typed.graph.output]
    names = [v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    present = {value.name for value in wide.graph.output}
    for name in names:
        if name not in present:
            wide.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        wide.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, names


def _least_error(histogram: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Shrink `low`..`high` to the range of least squared 8-bit rounding error on the histogram."""
    centres = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    best = (np.inf, low, high)
    for share in np.linspace(1.0, 0.3, 36):
        bottom, top = min(low, 0.0) * share, max(high, 0.0) * share
        step = max((top - bottom) / 255, 1e-12)
        rounded = np.clip(np.rint((centres - bottom) / step), 0, 255) * step + bottom
        error = float((histogram * np.square(centres - rounded)).sum())
        best = min(best, (error, bottom, top))
    return best[1], best[2]


def _central(histogram: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Cut the rarest values on each side of the histogram."""
    share = np.cumsum(histogram) / max(histogram.sum(), 1)
    width = (high - low) / BINS
    first, last = np.searchsorted(share, [OUTLIERS, 1 - OUTLIERS])
    return (low if low >= 0 else low + first * width), low + (min(last, BINS - 1) + 1) * width


def calibrate(model: str | Path | onnx.ModelProto, images: np.ndarray, method: str = "minmax") -> Ranges:
    """Run the model on `images` `(N, C, H, W)` and return the range of every activation by tensor name.

    Raises:
        UsageError: `method` is unknown or there are no images.
    """
    import onnx

    if method not in METHODS:
        raise UsageError(f"No calibration method '{method}'. Choose one of: {', '.join(METHODS)}.")
    if len(images) == 0:
        raise UsageError("Calibration got no images; give at least one, better 100 or more.")
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
    session, names = _open_all(proto)
    feed = proto.graph.input[0].name
    batches = [np.ascontiguousarray(images[i : i + BATCH], np.float32) for i in range(0, len(images), BATCH)]
    rows = []
    for batch in batches:
        values = [batch, *session.run(names, {feed: batch})]
        rows.append([(float(v.min()), float(v.max())) for v in values])
    table = np.array(rows)  # (batches, tensors, 2)
    lows, highs = table[..., 0].min(0), table[..., 1].max(0)
    keys = [feed, *names]
    if method == "moving":
        mean = table[0]
        for row in table[1:]:
            mean = DECAY * mean + (1 - DECAY) * row
        lows, highs = mean[:, 0], mean[:, 1]
    if method in ("percentile", "mse"):
        highs = np.where(highs > lows, highs, lows + 1e-6)
        counts = np.zeros((len(keys), BINS))
        for batch in batches:
            for i, value in enumerate([batch, *session.run(names, {feed: batch})]):
                counts[i] += np.histogram(value, BINS, (lows[i], highs[i]))[0]
        choose = _central if method == "percentile" else _least_error
        pairs = [choose(counts[i], lows[i], highs[i]) for i in range(len(keys))]
        return {key: (float(low), float(high)) for key, (low, high) in zip(keys, pairs, strict=True)}
    return {key: (float(low), float(high)) for key, low, high in zip(keys, lows, highs, strict=True)}
