"""The timing of the selective scan's forms: its rows, on tiny settings."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("selective_scan")


def test_every_shape_pass_and_form_has_a_row(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((1, 9, 4, 1), (2, 5, 3, 2)))
    app = bench.typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["--runs", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    assert {(r["shape"], r["pass"], r["method"]) for r in rows} == {
        (shape, which, method)
        for shape in ("1x9x4x1", "2x5x3x2")
        for which in ("forward", "train")
        for method in ("sequential", "chunked")
    }
    assert {r["times_as_fast"] for r in rows if r["method"] == "sequential"} == {"1.0"}
