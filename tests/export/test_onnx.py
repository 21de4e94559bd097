"""Tests of the ONNX export."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from featherweight.errors import DataError, FeatherweightError
from featherweight.export.onnx import LABELS_KEY, PREPROCESS_KEY, export_onnx, read_metadata, run_onnx


def small_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for _ in range(3):
        net(torch.randn(8, 3, 8, 8) * 2 + 1)
    return net


@pytest.mark.parametrize("exporter", ["traced", "graph"])
def test_one_file_with_dynamic_batch_and_folded_batch_norm(tmp_path, exporter):
    net = small_net()
    report = export_onnx(net, tmp_path / "m.onnx", (3, 8, 8), exporter=exporter)
    assert net.training
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert report.max_relative_error < 1e-5 and report.size_bytes == (tmp_path / "m.onnx").stat().st_size
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    kinds = {node.op_type for node in proto.graph.node}
    assert "BatchNormalization" not in kinds and "Identity" not in kinds
    assert proto.opset_import[0].version == report.opset == 18
    x = np.random.default_rng(0).standard_normal((7, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x, batch=3), expected, rtol=1e-4, atol=1e-5)


def test_metadata_travels_in_the_file(tmp_path):
    names = ["äpfel", "b, c"]
    export_onnx(small_net(), tmp_path / "m.onnx", (3, 8, 8), classes=names, preprocess_json='{"v": 1}')
    entries = read_metadata(tmp_path / "m.onnx")
    assert entries[LABELS_KEY] == names and entries[PREPROCESS_KEY] == '{"v": 1}'


class Noisy(nn.Module):
    """Answers differently at every call, so no export can agree with it."""

    def forward(self, x):
        return x.flatten(1)[:, :4] + torch.rand(4)


def test_a_file_that_differs_is_refused(tmp_path):
    with pytest.raises(FeatherweightError, match="Noisy"):
        export_onnx(Noisy(), tmp_path / "m.onnx", (3, 8, 8), exporter="traced")
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match="No ONNX file"):
        run_onnx(tmp_path / "none.onnx", np.zeros((1, 3, 8, 8)))
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match="cannot load"):
        run_onnx(tmp_path / "bad.onnx", np.zeros((1, 3, 8, 8)))


def test_running_a_file_does_not_import_torch(tmp_path):
    export_onnx(small_net(), tmp_path / "m.onnx", (3, 8, 8))
    code = (
        "import sys, numpy as np; from featherweight.export.onnx import run_onnx;"
        f"run_onnx({str(tmp_path / 'm.onnx')!r}, np.zeros((1, 3, 8, 8))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
