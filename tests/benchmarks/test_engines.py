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


def call(engines, networks, threads, out, clock="wall", peers="openvino,litert", prepare=False):
    """Run the program for some turns."""
    engines.main(networks, threads, ["float32"], False, peers, "", 6, 5.0, clock, out / "files", prepare, out)


def test_all_engines_agree_and_are_stored(engines, file, tmp_path):
    call(engines, [str(file)], [1], tmp_path / "out")
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
            call(engines, names, threads, tmp_path, clock)
        assert stop.value.exit_code == 2


def test_the_input_is_noise_with_a_batch_of_one(engines, file):
    name, x = engines.fixed_input(file)
    assert name == "image" and x.shape == (1, 3, 8, 8) and np.std(x) > 0.5


def test_absent_peers_are_told(engines, file, tmp_path, capsys, caplog):
    call(engines, [str(file)], [1], tmp_path / "out", peers="litert,torch.compile")
    out = capsys.readouterr().out
    assert out.count(" absent ") == 2 and "litert" in out and "takes networks by name" in caplog.text


def test_an_unknown_peer_ends_with_code_2(engines, file, tmp_path):
    with pytest.raises(typer.Exit) as stop:
        call(engines, [str(file)], [1], tmp_path, peers="openvion")
    assert stop.value.exit_code == 2


def test_sparse_files_have_the_zeros_of_their_name(engines, tmp_path):
    files = importlib.import_module("engine_files")
    dense, sparse = (files.make_module("mobilenetv2_035", form) for form in ("float32", "sparse90"))
    for name, weight in sparse.state_dict().items():
        zeros = float((weight == 0).float().mean())
        pointwise = weight.ndim == 4 and weight.shape[2:] == (1, 1)
        assert not pointwise or abs(zeros - 0.9) < 0.01, name
        assert pointwise or torch.equal(weight, dense.state_dict()[name]), name


def test_a_worker_answers_and_takes_turns(engines, tmp_path):
    peers, files = (importlib.import_module(name) for name in ("engine_peers", "engine_files"))
    file = files.File("mobilenetv2_035", "float32", tmp_path / "net.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    worker = peers.Worker("torch", peers.Task(file, "image", x, 1, tmp_path))
    try:
        with torch.inference_mode():
            expected = files.make_module("mobilenetv2_035", "float32")(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(worker.answer, expected, atol=1e-5)
        assert 0 < worker.turn("wall") < 60_000
    finally:
        worker.close()
    with pytest.raises(RuntimeError, match="no_such_network"):
        peers.Worker(
            "torch", peers.Task(files.File("no_such_network", "float32", file.path), "x", x, 1, tmp_path)
        )
