"""Tests of post-training quantisation."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from featherweight.errors import DataError, UsageError
from featherweight.shrink.calibrate import METHODS, calibrate
from featherweight.shrink.quantize import (
    QuantizeConfig,
    quantizable_layers,
    quantize_onnx,
    quantize_within,
    sensitivity,
)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((40, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def float_path(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
        nn.MaxPool2d(2), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("float") / "m.onnx"
    torch.onnx.export(net.eval(), (torch.zeros(2, 3, 16, 16),), path, dynamo=False, opset_version=18,
                      input_names=["image"], output_names=["logits"],
                      dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}})  # fmt: skip
    proto = onnx.load(path)
    proto.metadata_props.add(key="featherweight.labels", value="[]")
    onnx.save(proto, path)
    return path


def run(path, x, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0]


def error(path, float_path, x):
    expected = run(float_path, x)
    return float(np.linalg.norm(run(path, x) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("activation", ["uint8", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_close_small_and_integer_all_through(tmp_path, float_path, images, method, activation):
    path = tmp_path / "q.onnx"
    quantize_onnx(float_path, path, images, config=QuantizeConfig(activation=activation, method=method))
    assert error(path, float_path, images) < 0.1
    assert path.stat().st_size < 0.3 * float_path.stat().st_size
    proto = onnx.load(path)
    assert [(p.key, p.value) for p in proto.metadata_props] == [("featherweight.labels", "[]")]
    run(path, images[:1], tmp_path / "o.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") == 4 and kinds.count("QGemm") == 1
    assert not {"Conv", "Gemm", "Relu", "Clip", "DequantizeLinear"} & set(kinds)


def test_per_channel_weights_survive_filters_of_unequal_size(tmp_path, float_path, images):
    proto = onnx.load(float_path)
    for tensor in proto.graph.initializer:
        if list(tensor.dims) == [64, 16, 3, 3]:
            values = (
                onnx.numpy_helper.to_array(tensor) * np.where(np.arange(64) % 2, 1, 100)[:, None, None, None]
            )
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), tensor.name))
    onnx.save(proto, tmp_path / "f.onnx")
    quantize_onnx(tmp_path / "f.onnx", tmp_path / "q.onnx", images)
    steps = [t for t in onnx.load(tmp_path / "q.onnx").graph.initializer if list(t.dims) == [64]]
    assert len(steps) >= 2
    assert error(tmp_path / "q.onnx", tmp_path / "f.onnx", images) < 0.1


def test_layers_kept_in_float(tmp_path, float_path, images):
    layers = quantizable_layers(float_path)
    assert len(layers) == 5
    quantize_onnx(float_path, tmp_path / "q.onnx", images, keep_float=layers)
    np.testing.assert_allclose(run(tmp_path / "q.onnx", images), run(float_path, images), atol=0.05)
    with pytest.raises(UsageError, match="Did you mean"):
        quantize_onnx(float_path, tmp_path / "q.onnx", images, keep_float=[layers[0] + "x"])


def test_ranges_hold_what_was_seen(float_path, images):
    ranges = {method: calibrate(float_path, images, method) for method in METHODS}
    assert ranges["minmax"]["image"] == (pytest.approx(images.min()), pytest.approx(images.max()))
    for method in METHODS:
        for name, (low, high) in ranges[method].items():
            least, most = ranges["minmax"][name]
            # A range may be widened to hold 0, which costs nothing: the quantiser does so anyway.
            assert min(least, 0) - 1e-5 <= low <= high <= max(most, 0) + 1e-5
    with pytest.raises(UsageError, match="minmax"):
        calibrate(float_path, images, "median")
    with pytest.raises(UsageError, match="no images"):
        calibrate(float_path, images[:0])


def test_sensitivity_finds_the_layer_that_hurts(float_path, images):
    scores = sensitivity(float_path, images)
    assert {s.name for s in scores} == set(quantizable_layers(float_path))
    assert scores[0].loss >= scores[-1].loss >= 0
    by_score = sensitivity(float_path, images, evaluate=lambda path: -error(path, float_path, images[:8]))
    assert by_score[0].loss > 0


def test_within_stops_early_keeps_layers_and_admits_failure(tmp_path, float_path, images):
    def score(path):
        return 100 * (1 - error(path, float_path, images))

    easy = quantize_within(float_path, tmp_path / "q.onnx", images, score, max_drop=10)
    assert easy.within and easy.kept_float == () and easy.score == pytest.approx(score(tmp_path / "q.onnx"))
    tight = quantize_within(float_path, tmp_path / "q.onnx", images, score, (100 - easy.score) * 0.8)
    assert tight.kept_float and tight.score > easy.score
    never = quantize_within(float_path, tmp_path / "q.onnx", images, score, -1, keep_layers=False)
    assert not never.within and never.kept_float == () and (tmp_path / "q.onnx").is_file()


def test_a_broken_file_is_refused(tmp_path, images):
    (tmp_path / "f.onnx").write_bytes(b"no model")
    with pytest.raises(DataError):
        quantize_onnx(tmp_path / "f.onnx", tmp_path / "q.onnx", images)


def test_norms_that_no_convolution_takes_in_stay_float(tmp_path, images, caplog):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), norm, nn.ReLU(), nn.Conv2d(8, 8, 3))
    nn.init.uniform_(norm.weight, 0.01, 5.0)
    float_path, path = tmp_path / "m.onnx", tmp_path / "q.onnx"
    torch.onnx.export(net.eval(), (torch.zeros(1, 3, 16, 16),), float_path, dynamo=False, opset_version=18,
                      input_names=["image"], output_names=["logits"],
                      dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}})  # fmt: skip
    quantize_onnx(float_path, path, images)
    proto = onnx.load(path)
    kept = next(node for node in proto.graph.node if node.op_type == "BatchNormalization")
    scale = next(t for t in proto.graph.initializer if t.name == kept.input[1])
    assert np.array_equal(onnx.numpy_helper.to_array(scale), norm.weight.detach().numpy())
    assert not caplog.records
    assert error(path, float_path, images) < 0.1
