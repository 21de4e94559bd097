"""The benchmark of engines on a network of two layers."""

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def engines():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("engines")


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    path = tmp_path / "tiny.onnx"
    torch.onnx.export(net.eval(), (torch.zeros(1, 3, 8, 8),), path, dynamo=False, opset_version=18,
                      input_names=["image"], output_names=["logits"])  # fmt: skip
    return path


def test_all_engines_agree_and_are_stored(engines, file, tmp_path):
    engines.main([str(file)], [1], None, False, False, 6, 5.0, "wall", tmp_path / "out")
    (table,) = (tmp_path / "out").glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["engine"] for row in rows} >= {"featherweight", "onnxruntime"}
    assert all(float(row["difference"]) < 1e-5 and float(row["p50_ms"]) > 0 for row in rows)
    assert {row["macs"] for row in rows} == {str(6 * 6 * 8 * 27 + 32)}
    assert max(float(row["times_as_fast"]) for row in rows if row["engine"] != "featherweight") == 1.0
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_is_a_geometric_mean(engines):
    rows = [
        {"network": name, "form": "int8", "threads": 1, "engine": engine, "times_as_fast": ratio}
        for name, ratio in (("a", "2.0"), ("b", "0.5"))
        for engine, ratio in (("featherweight", ratio), ("onnxruntime", "1.0"))
    ]
    (line,) = engines.summary(rows)
    assert "1.00 times" in line and "least 0.50 (b)" in line


def test_bad_requests_end_with_code_2(engines, file, tmp_path):
    for names, threads, clock in (([str(file)], [2], "cpu"), (["no_such_network"], [1], "wall")):
        with pytest.raises(typer.Exit) as stop:
            engines.main(names, threads, None, False, False, 5, 1.0, clock, tmp_path)
        assert stop.value.exit_code == 2


def test_the_input_is_noise_with_a_batch_of_one(engines, file):
    name, x = engines.fixed_input(file)
    assert name == "image" and x.shape == (1, 3, 8, 8) and np.std(x) > 0.5
