"""Networks of the registry: compiled and onnxruntime's answers agree; small inputs, so each takes seconds."""

import numpy as np
import onnxruntime
import pytest
import torch

from featherweight.compiler import compile_onnx
from featherweight.compiler.driver import random_inputs
from featherweight.export.onnx import export_onnx
from featherweight.registry import create_model
from featherweight.shrink.quantize import quantize_onnx

QUICK = {"mobilenetv2_035": 64, "shufflenetv2_050": 64, "simplenet_cifar_310k": 32}
SLOW = {
    "ghostnetv2_100": 64,
    "mobilenetv2_100": 224,
    "ghostnet_050": 224,
    "inceptionnext_atto": 64,
    "efficientformer_l1": 224,
    "emov2_1m": 64,
    "osnet_x0_25": 64,
    "osnet_ain_x0_25": 64,
    "unireplknet_a": 64,
    "convfirstnet_tiny": 64,
    "affnet_t": 64,
    "lsnet_t": 64,
    "spartan_t": 224,
    "sugarcane_shufflenet": 64,
    "mobilemamba_t2": 192,
}


def export(name, size, path):
    torch.manual_seed(0)
    model = create_model(name)
    for module in model.modules():
        # Running statistics away from their start, or folding them would change nothing.
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    export_onnx(model, path, (3, size, size))


def check(name, size, tmp_path):
    path = tmp_path / "net.onnx"
    export(name, size, path)
    session = compile_onnx(path, tmp_path / "out")
    feeds = random_inputs(session)
    reference = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for got, expected in zip(session.run(None, feeds), reference.run(None, feeds), strict=True):
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    return session


@pytest.mark.parametrize("name", QUICK)
def test_small_networks_equal_onnxruntime(name, tmp_path):
    check(name, QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_networks_equal_onnxruntime(name, tmp_path):
    check(name, SLOW[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv2_100", "ghostnetv2_100", "shufflenetv2_100", "inceptionnext_atto"]
)
def test_quantised_networks_equal_onnxruntime(name, tmp_path):
    """Logits may leave the integers' last digits: a step of one layer is a step of all behind it."""
    export(name, 96, tmp_path / "net.onnx")
    images = np.random.default_rng(0).standard_normal((4, 3, 96, 96)).astype(np.float32)
    path = quantize_onnx(tmp_path / "net.onnx", tmp_path / "net.int8.onnx", images)
    session = compile_onnx(path, tmp_path / "out")
    reference = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: images[:1]}
    (got,), (expected,) = session.run(None, feeds), reference.run(None, feeds)
    assert np.abs(got - expected).max() <= 0.02 * np.abs(expected).max()
