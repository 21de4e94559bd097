"""The field's protocol against the measures by hand, and the published figures of official weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_restorers import picture, write_restorer

from featherweight.cli.main import main
from featherweight.data.bicubic import imresize
from featherweight.errors import DataError, UsageError
from featherweight.measure.image_quality import psnr, ssim, to_y
from featherweight.workflows.evaluate_sr import evaluate_sr
from featherweight.workflows.upscale import Upscaler

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    for index in range(2):
        Image.fromarray(np.roll(picture(41, 50), 5 * index, 0)).save(tmp_path / "set" / f"p{index}.png")
    return tmp_path / "set"


def test_measures_are_those_by_hand(tmp_path: Path, data: Path) -> None:
    network = write_restorer(tmp_path / "a.onnx")
    result = evaluate_sr(network, data, csv_path=tmp_path / "r.csv", report=tmp_path / "r.html")
    high = picture(41, 50)[:40]
    low = imresize(high, 0.5)
    mine = to_y(Upscaler(network).enlarge(low))
    row = result["pictures"][0]
    assert row["psnr"] == pytest.approx(psnr(mine, to_y(high), 2))
    assert row["ssim"] == pytest.approx(ssim(mine, to_y(high), 2))
    assert row["bicubic_psnr"] == pytest.approx(psnr(to_y(imresize(low, 2)), to_y(high), 2))
    assert result["low_resolution"] == "bicubic" and result["scale"] == 2
    assert result["mean"]["psnr"] == pytest.approx(np.mean([r["psnr"] for r in result["pictures"]]))
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [r["name"] for r in rows] == ["p0", "p1"] and float(rows[0]["psnr"]) == row["psnr"]
    assert (tmp_path / "r.html").read_text().count('type="range"') == 2


def test_verb_prints_a_table_or_json(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    network = str(write_restorer(tmp_path / "a.onnx"))
    assert main(["evaluate-sr", network, str(data)]) == 0
    assert "bicubic dB" in (text := capsys.readouterr().out) and "mean" in text
    assert main(["evaluate-sr", network, str(data), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["mean"]) == {
        "psnr",
        "ssim",
        "bicubic_psnr",
        "bicubic_ssim",
    }
    assert main(["evaluate-sr", network, str(tmp_path / "gone")]) == 3
    assert main(["evaluate-sr", network, str(data), "--scale", "3"]) == 2


def test_requests_that_cannot_be(tmp_path: Path, data: Path) -> None:
    same = write_restorer(tmp_path / "same.onnx", scale=1)
    with pytest.raises(UsageError, match="whole number from 2"):
        evaluate_sr(same, data)
    assert evaluate_sr(same, data, scale=2)["scale"] == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no large picture"):
        evaluate_sr(same, tmp_path / "none", scale=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "published", "digits"),
    [
        ("imdn_x2", "IMDN_x2.pth", 38.00, 0.9605),
        ("imdn_x4", "IMDN_x4.pth", 32.21, 0.8948),
        ("cfsr_x4", "CFSR_x4.pth", 32.33, 0.8964),
    ],
)
def test_official_weights_reach_their_published_figures(
    name: str, weights: str, published: float, digits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (SHARED / "weights" / weights).is_file() or not (SHARED / "data" / "set5").is_dir():
        pytest.skip("official weights and Set5 are not beside the project")
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    mean = evaluate_sr(
        name, "set5", data_root=SHARED / "data", weights=SHARED / "weights" / weights, engine="onnxruntime"
    )["mean"]
    assert mean["psnr"] == pytest.approx(published, abs=0.02)
    assert mean["ssim"] == pytest.approx(digits, abs=2e-4)
