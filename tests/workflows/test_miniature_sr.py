"""Official weights reach the published figures on Set5 and BSD100; verdicts in dB; the check's protocol."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data.pictures import Pictures
from featherweight.errors import DataError
from featherweight.models.imdn import IMDN
from featherweight.train.patches import Restoration
from featherweight.workflows.miniature_sr import (
    benchmark_pictures,
    check_figures,
    judge_db,
    official_network,
    published_figures,
    spread_db,
    train,
    training_pictures,
)
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN
from featherweight.workflows.restoration_check import PictureCheck

SHARED = Path(os.environ.get("FEATHERWEIGHT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
DATA = SHARED / "data"
CASES = [
    ("imdn_x4", "set5", 32.21, 0.8948),
    ("cfsr_x4", "set5", 32.33, 0.8964),
    pytest.param("imdn_x2", "set5", 38.00, 0.9605, marks=pytest.mark.slow),
    pytest.param("imdn_x2", "bsd100", 32.19, 0.8996, marks=pytest.mark.slow),
    pytest.param("imdn_x4", "bsd100", 27.56, 0.7353, marks=pytest.mark.slow),
    pytest.param("cfsr_x4", "bsd100", 27.63, 0.7381, marks=pytest.mark.slow),
]
FILES = {
    "imdn_x2": "IMDN_x2",
    "imdn_x4": "IMDN_x4",
    "cfsr_x4": "CFSR_x4",
    "imdn_rtc": "model_RTC",
    "dscf_x4": "DSCF_x4",
}


def given(name: str, data: str) -> None:
    """Skip where the weights or the pictures are not there."""
    for path in (SHARED / "weights" / f"{FILES[name]}.pth", DATA / data):
        if not path.exists():
            pytest.skip(f"{path.name} is not beside the project")


@pytest.mark.parametrize(("name", "data", "psnr", "ssim"), CASES)
def test_published_figures_are_reached(name, data, psnr, ssim):
    given(name, data)
    found = benchmark_pictures(data, int(name[-1]), DATA).measure(official_network(name, DATA))
    assert abs(found["psnr"] - psnr) <= 0.02
    assert abs(found["ssim"] - ssim) <= 0.0005
    claimed = published_figures(name, data)
    assert (claimed["psnr"].value, claimed["ssim"].value) == (psnr, ssim)


@pytest.mark.parametrize(("name", "gain"), [("imdn_rtc", 2.0), ("dscf_x4", 3.0)])
def test_small_networks_leave_bicubic_behind(name, gain):
    given(name, "set5")
    model = official_network(name, DATA)
    check = benchmark_pictures("set5", model.scale, DATA)
    assert check.measure(model)["psnr"] > check.measure(None)["psnr"] + gain


def test_bicubic_is_as_published():
    given("imdn_x4", "set5")
    for scale, psnr, ssim in ((2, 33.66, 0.9299), (4, 28.42, 0.8104)):
        found = benchmark_pictures("set5", scale, DATA).measure(None)
        assert abs(found["psnr"] - psnr) < 0.02 and abs(found["ssim"] - ssim) < 0.001


class Nearest(nn.Module):
    """Repeats pixels, too bright by the parameter."""

    scale = 2

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) + self.offset


def test_the_score_cuts_the_border_and_knows_luma():
    low = np.full((12, 12, 3), 100, np.uint8)
    high = low.repeat(2, 0).repeat(2, 1)
    high[:2], high[:, -2:] = 0, 255  # within the border: not seen
    check = PictureCheck(Pictures(2, ("flat",), [high], [low]))
    model = Nearest(0.0).train()
    assert check.score(model)[0] == math.inf and model.training
    step = 10 * (65.481 + 128.553 + 24.966) / 255
    expected = 20 * math.log10(255 / step)
    assert check.score(Nearest(10 / 255))[0] == pytest.approx(expected, abs=1e-9)
    assert check.measure(Nearest(10 / 255))["psnr"] == pytest.approx(expected, abs=1e-9)
    assert len(check.head(0)) == 0 and len(PictureCheck(None)) == 0


def test_training_lowers_the_error():
    noise = np.random.RandomState(0)
    low = noise.randint(0, 256, (24, 24, 3)).astype(np.uint8)
    pictures = Pictures(2, ("noise",), [low.repeat(2, 0).repeat(2, 1)], [low])
    torch.manual_seed(0)
    model = IMDN(2, channels=8, depth=1)
    check = PictureCheck(pictures)
    before = check.score(model)[1]
    trained = train(model, pictures, Restoration(patch=16), steps=40, batch=4, lr=5e-3, seed=0)
    assert trained is model and not model.training and check.score(model)[1] < 0.7 * before


def test_verdicts_in_decibels():
    assert judge_db([31.0, 31.1, 31.05], [30.9, 31.0, 30.96]) == HOLDS
    assert judge_db([31.0, 31.1, 31.05], [31.01, 31.11, 31.06]) == FAILS
    assert judge_db([31.0, 31.1, 31.05], [31.01, 31.11, 31.06], margin=0.05) == HOLDS
    assert judge_db([31.0, 31.4], [31.2, 31.2]) == OPEN and judge_db([31.0], [30.0]) == OPEN
    assert spread_db([31.5]) == "31.500 dB"


def test_missing_sets_are_named():
    for build in (lambda: benchmark_pictures("set5", 2, None), lambda: training_pictures(None, 2, 8)):
        with pytest.raises(DataError, match="--data-root"):
            build()


def test_figures_beside_the_published_ones(monkeypatch):
    given("dscf_x4", "set5")
    lines = []
    rows, verdict = check_figures(["dscf_x4"], ["set5"], DATA, lines.append, limit=1)
    assert rows[0]["published_db"] is None and verdict == HOLDS and len(lines) == 1
    assert check_figures(["imdn_rtc"], ["set5"], DATA, lines.append, limit=1)[0][0]["psnr_db"] > 30
