"""Prediction with a model small enough to compute by hand: the brightest channel wins."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from brightest import COLOURS, write_model
from PIL import Image

from featherweight.cli.main import main
from featherweight.errors import CheckpointError
from featherweight.workflows.predict import Predictor, find_model, predict


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_model(folder / "model.onnx")
    write_model(folder / "model.int8.onnx")
    return folder


def test_predict_orders_classes(run, tmp_path):
    Image.new("RGB", (20, 10), COLOURS["green"]).save(tmp_path / "g.png")
    [found] = predict(run, [tmp_path / "g.png"], top=2)
    assert found.top[0][0] == "green" and len(found.top) == 2
    assert found.top[0][1] == pytest.approx(np.e / (np.e + 2), abs=1e-6)


def test_falls_back_to_the_files_beside_the_model(tmp_path):
    spec = write_model(tmp_path / "bare.onnx", metadata=False)
    with pytest.raises(CheckpointError, match=r"preprocess\.json"):
        Predictor(tmp_path / "bare.onnx")
    (tmp_path / "preprocess.json").write_text(spec.to_json())
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    assert Predictor(tmp_path / "bare.onnx").labels == ("red", "green", "blue")


def test_the_chosen_variant_is_taken(run):
    assert find_model(run).name == "model.int8.onnx"
    (run / "metrics.json").write_text('{"chosen": "float32"}')
    assert find_model(run).name == "model.onnx"
    (run / "metrics.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"metrics\.json"):
        find_model(run)


def test_unreadable_images_are_named_after_the_rest_was_classified(run, tmp_path, capsys):
    Image.new("RGB", (9, 9), COLOURS["blue"]).save(tmp_path / "b.png")
    (tmp_path / "bad.jpg").write_text("not an image")
    words = ["predict", str(run), str(tmp_path / "bad.jpg"), str(tmp_path / "b.png")]
    assert main(words) == 3
    captured = capsys.readouterr()
    assert "b.png: blue" in captured.out and "bad.jpg" in captured.err
    assert main([*words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)[0]["top"][0]["class"] == "blue"


def test_damaged_and_missing_models(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a usable ONNX model"):
        Predictor(tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match="holds no"):
        Predictor(tmp_path)
    with pytest.raises(CheckpointError, match="No run folder"):
        Predictor(tmp_path / "nowhere")


def test_starts_in_under_a_second_without_torch(run, tmp_path):
    Image.new("RGB", (9, 9), COLOURS["blue"]).save(tmp_path / "b.png")
    words = ["predict", str(run), str(tmp_path / "b.png")]
    code = (
        f"import sys; from featherweight.cli.main import main; "
        f"main({words}); sys.exit('torch' in sys.modules)"
    )
    walls = []
    for _ in range(3):  # the fastest of three, because other work may share the machine
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        walls.append(time.monotonic() - began)
        assert done.returncode == 0, done.stderr
    assert min(walls) < 1.0, walls
