"""Prediction and evaluation on a model small enough to compute by hand: the brightest channel wins."""

import json
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from featherweight.cli.main import main
from featherweight.data.preprocess import Preprocess
from featherweight.errors import CheckpointError, DataError
from featherweight.workflows.evaluate import evaluate
from featherweight.workflows.predict import Predictor, find_model, predict

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_model(path, labels=tuple(COLOURS), metadata=True):
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], keepdims=0)]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "brightest", [image], [logits], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = Preprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    if metadata:
        props = {"featherweight.preprocess": spec.to_json(), "featherweight.labels": json.dumps(labels)}
        helper.set_model_props(model, props)
    onnx.save(model, path)
    return spec


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_model(folder / "model.onnx")
    write_model(folder / "model.int8.onnx")
    return folder


@pytest.fixture
def data(tmp_path):
    """Twelve images per class; two of the red test images are really green."""
    for split, count in (("train", 12), ("val", 4), ("test", 10)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                seen = COLOURS["green"] if (split, name) == ("test", "red") and i < 2 else colour
                shade = tuple(
                    max(0, value - i - {"train": 0, "val": 20, "test": 40}[split]) for value in seen
                )
                Image.new("RGB", (8 + i, 8), shade).save(folder / f"{i}.png")
    return tmp_path / "data"


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


def test_evaluate_matches_classes_by_name(run, data):
    found = evaluate(run, data)
    assert found["images"] == 30 and set(found["variants"]) == {"float32", "int8"}
    entry = found["variants"]["int8"]
    assert entry["test_accuracy"] == pytest.approx(28 / 30)
    low, high = entry["test_accuracy_interval"]
    assert low < 28 / 30 < high
    scores = {row["class"]: row for row in entry["per_class"]}
    assert scores["red"]["recall"] == pytest.approx(0.8) and scores["red"]["precision"] == 1.0
    assert scores["green"]["precision"] == pytest.approx(10 / 12)


def test_evaluate_refuses_foreign_classes(tmp_path, data):
    write_model(tmp_path / "other.onnx", labels=("red", "green", "violet"))
    with pytest.raises(DataError, match="does not know: blue"):
        evaluate(tmp_path / "other.onnx", data)


def test_evaluate_prints_tables_and_json(run, data, capsys):
    assert main(["evaluate", str(run), str(data)]) == 0
    assert "93.33%" in capsys.readouterr().out
    assert main(["evaluate", str(run), str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"]["float32"]["file"] == "model.onnx"
