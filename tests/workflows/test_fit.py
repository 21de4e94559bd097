"""The main job on small data: every step really runs, only shorter."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from featherweight import fit, predict
from featherweight.cli.main import main
from featherweight.errors import BudgetError, CheckpointError, MissingExtraError, UsageError
from featherweight.train.checkpoint import load_tensors
from featherweight.workflows.engine import add_engines
from featherweight.workflows.predict import ENGINES

SHORT = {"models": "simplenet_cifar_310k", "epochs": 1, "time": "20s", "max_macs": "2M"}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """One run on the digits that most tests look at."""
    out = tmp_path_factory.mktemp("fit") / "run"
    return fit("digits", out=out, **{**SHORT, "epochs": 4})


def test_the_bundle_is_complete(digits_run):
    names = {path.name for path in digits_run.run_dir.iterdir()}
    assert names >= {
        *("config.json", "model.onnx", "model.int8.onnx", "preprocess.json", "labels.txt"),
        *("metrics.json", "report.html", "README.md"),
    }
    assert (digits_run.run_dir / "train" / "metrics.jsonl").exists()
    assert (digits_run.run_dir / "labels.txt").read_text().split() == list("0123456789")


def test_the_metrics_hold_what_is_promised(digits_run):
    metrics = json.loads((digits_run.run_dir / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(digits_run.metrics))
    assert metrics["model"] == "simplenet_cifar_310k"
    assert metrics["opset"] >= 18
    assert {"data", "search", "train", "shrink", "measure", "report"} <= set(metrics["wall_s"])
    assert set(metrics["variants"]) == {"float32", "int8"}
    for variant in metrics["variants"].values():
        low, high = variant["test_accuracy_interval"]
        assert low <= variant["test_accuracy"] <= high
        assert 0 < variant["latency_ms"]["p50"] <= variant["latency_ms"]["p95"]
        assert variant["latency_ms"]["threads"] == 1
        assert variant["macs"] <= 2e6
        assert variant["peak_memory_bytes"] > variant["size_bytes"] / 10
        assert len(variant["per_class"]) == 10
    assert metrics["variants"]["int8"]["size_bytes"] < metrics["variants"]["float32"]["size_bytes"] / 2


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_bundle_holds_a_compiled_engine_with_the_same_answers(digits_run, tmp_path):
    for name, variant in digits_run.metrics["variants"].items():
        engine = variant["compiled"]
        assert engine["agreement"] >= 0.99
        assert engine["latency_ms"]["p50"] > 0 and engine["onnxruntime_latency_ms"]["p50"] > 0
        assert (digits_run.run_dir / engine["folder"] / "model.c").exists(), name
    assert "compiled p50" in digits_run.report_path.read_text()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).save(tmp_path / "x.png")
    results = [predict(digits_run.run_dir, [tmp_path / "x.png"], engine=name) for name in ENGINES]
    tops = [dict(result[0].top) for result in results]
    assert tops[0].keys() == tops[1].keys()
    assert all(tops[0][name] == pytest.approx(tops[1][name], abs=0.02) for name in tops[0])


def test_a_run_without_compiled_engine_says_how_to_make_one(digits_run, tmp_path):
    for name in ("metrics.json", "model.int8.onnx"):
        (tmp_path / name).write_bytes((digits_run.run_dir / name).read_bytes())
    with pytest.raises(CheckpointError, match="featherweight compile"):
        predict(tmp_path, [tmp_path / "x.png"], engine="compiled")
    with pytest.raises(UsageError, match="onnxruntime, compiled"):
        predict(digits_run.run_dir, [], engine="fast")


def test_without_a_c_compiler_the_run_goes_on_and_says_so(digits_run, monkeypatch, tmp_path):
    def missing(*_):
        raise MissingExtraError("No C compiler. Install gcc.")

    monkeypatch.setattr("featherweight.workflows.engine.compile_onnx", missing)
    shutil.copy(digits_run.run_dir / "model.onnx", tmp_path)
    before = {"float32": digits_run.content.variants["float32"]}
    variants, notes = add_engines(tmp_path, before, np.zeros((1, 1, 8, 8), np.float32))
    assert variants == before
    assert "Install gcc" in notes[0]


def test_it_learns_and_int8_loses_no_more_than_allowed(digits_run):
    assert digits_run.metrics["variants"]["float32"]["test_accuracy"] > 0.8
    val = digits_run.metrics["val_accuracy"]
    assert val["float32"] - val["int8"] <= digits_run.metrics["budget"]["max_drop"] / 100


def test_the_int8_file_holds_integer_weights(digits_run):
    graph = onnx.load(digits_run.run_dir / "model.int8.onnx").graph
    stored = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert stored == {onnx.TensorProto.INT8}


def test_the_report_shows_the_figures_and_needs_no_network(digits_run):
    page = digits_run.report_path.read_text()
    assert f"{100 * digits_run.metrics['variants']['int8']['test_accuracy']:.1f}" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)


def test_evaluate_agrees_with_the_run(digits_run):
    from featherweight import evaluate

    again = evaluate(digits_run.run_dir, "digits")
    for name, variant in digits_run.metrics["variants"].items():
        assert again["variants"][name]["test_accuracy"] == pytest.approx(variant["test_accuracy"])


def test_predict_reads_the_bundle_without_torch(digits_run, tmp_path):
    Image.fromarray(np.full((20, 20), 200, np.uint8)).save(tmp_path / "x.png")
    code = (
        "import sys; from featherweight.cli.main import main\n"
        f"code = main(['predict', {str(digits_run.run_dir)!r}, {str(tmp_path / 'x.png')!r}, '--json'])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_the_same_seed_gives_the_same_weights(digits_run, tmp_path):
    again = fit("digits", out=tmp_path / "run", **{**SHORT, "epochs": 4})
    first = load_tensors(digits_run.run_dir / "train" / "model.safetensors")
    second = load_tensors(again.run_dir / "train" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all((first[key] == second[key]).all() for key in first)


def test_resuming_a_finished_run_measures_the_same_model(tmp_path):
    fit("digits", out=tmp_path / "run", **SHORT)
    before = (tmp_path / "run" / "model.onnx").read_bytes()
    fit("digits", out=tmp_path / "run", resume=True, **SHORT)
    assert (tmp_path / "run" / "model.onnx").read_bytes() == before


def test_an_impossible_budget_names_the_limit_and_the_nearest(tmp_path):
    with pytest.raises(BudgetError, match=r"nearest.*MACs .* > 0\.00 M"):
        fit("digits", out=tmp_path / "run", models="simplenet_cifar_310k", max_macs=1000, time="10s")


def test_skipped_files_are_listed_and_the_run_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(24):
            pixels = rng.integers(0, 40, (16, 16, 3), np.uint8) + np.uint8(level)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    (tmp_path / "data" / "dark" / "broken, really.jpg").write_text("not an image")
    result = fit(tmp_path / "data", out=tmp_path / "run", **SHORT)
    rows = list(csv.DictReader((tmp_path / "run" / "skipped.csv").open()))
    assert [row["path"].rsplit("/")[-1] for row in rows] == ["broken, really.jpg"]
    assert result.content.classes == ("dark", "light")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["fit", "digits", "--time", "soon"], 2),
        (["fit", "digits", "--max-latency", "5 parsecs"], 2),
        (["fit", "digits", "--models", "mobilnet"], 2),
        (["fit", "no/such/folder"], 3),
        (["fit", "digits", "--max-macs", "10", "--models", "simplenet_cifar_310k", "--time", "10s"], 4),
    ],
)
def test_exit_codes(words, code, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path / "run")]) == code
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("featherweight: ")


def test_resume_without_a_run_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="--out"):
        fit("digits", resume=True)
