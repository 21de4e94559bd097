"""Evaluation of a model whose answers are known: two of thirty test images carry the wrong label."""

import json

import pytest
from brightest import COLOURS, write_model
from PIL import Image

from featherweight.cli.main import main
from featherweight.errors import DataError
from featherweight.workflows.evaluate import evaluate


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


def test_evaluate_takes_one_file(run, data):
    assert list(evaluate(run / "model.int8.onnx", data)["variants"]) == ["int8"]
    assert list(evaluate(run / "model.onnx", data)["variants"]) == ["model"]
