"""train-sr: from a folder of photographs to a delivered network, its command line, DSCLoRA, bad requests."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from featherweight.cli.main import main
from featherweight.errors import UsageError
from featherweight.registry import create_model
from featherweight.workflows.train_sr import TrainSROptions, plan_training, train_sr

SMALL = ["--model", "span_x2", "--channels", "6", "--epochs", "2", "--patch", "16", "--batch", "4"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rows, columns = np.mgrid[:48, :40]
    for index in range(5):
        waves = np.stack([np.sin(rows / (3 + index + c)) + np.cos(columns / (4 + c)) for c in range(3)], 2)
        Image.fromarray(np.uint8(127 + 60 * waves)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def trained(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "span"
    assert main(["train-sr", str(photographs), *SMALL, "--out", str(out), "--json"]) == 0
    return out


def test_the_run_folder_holds_what_was_promised(trained):
    names = {path.name for path in trained.iterdir()}
    expected = {"config.json", "metrics.json", "metrics.jsonl", "model.onnx", "model.safetensors"}
    assert expected | {"preprocess.json", "README.md", "state.json"} <= names and "pictures.raw" not in names
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (
        metrics["pictures"] == {"train": 4, "val": 1, "skipped": 1}
        and metrics["skipped"][0][0] == "broken.png"
    )
    assert set(metrics["val"]) == {"psnr", "ssim"} and metrics["val_bicubic"]["psnr"] > 20
    card = (trained / "README.md").read_text()
    assert f"{metrics['params']:,} parameters" in card and "bicubic" in card


def test_weights_and_file_give_the_same_image_of_any_size(trained):
    model = create_model("span_x2", channels=6).eval()
    model.load_official(trained / "model.safetensors")
    session = onnxruntime.InferenceSession(str(trained / "model.onnx"))
    for size in ((1, 3, 9, 14), (2, 3, 31, 8)):
        x = torch.rand(size)
        found = session.run(None, {"image": x.numpy()})[0]
        expected = model(x).detach().numpy()
        assert (
            found.shape == expected.shape and np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        )


def test_low_rank_updates_of_the_trained_network(trained, photographs, tmp_path):
    words = ["--weights", str(trained / "model.safetensors"), "--adapt", "--teacher", "span_x2"]
    words += ["--teacher-channels", "6", "--teacher-weights", str(trained / "model.safetensors")]
    assert main(["train-sr", str(photographs), *SMALL, *words, "--out", str(tmp_path / "run")]) == 0
    before, after = (json.loads((p / "metrics.json").read_text()) for p in (trained, tmp_path / "run"))
    assert after["params"] == before["params"] and after["macs_64x64"] == before["macs_64x64"]
    assert after["adapted"] and after["val_before"] == before["val"]
    old, new = (create_model("span_x2", channels=6) for _ in range(2))
    old.load_official(trained / "model.safetensors")
    new.load_official(tmp_path / "run" / "model.safetensors")
    assert torch.equal(old.stem.weight, new.stem.weight)
    assert not torch.equal(old.last.weight, new.last.weight)


def test_a_finished_run_is_not_overwritten_and_resumes_to_the_same(trained, photographs):
    words = ["train-sr", str(photographs), *SMALL, "--out", str(trained)]
    before = (trained / "model.safetensors").read_bytes()
    assert main(words) == 2
    assert main([*words, "--resume"]) == 0
    assert (trained / "model.safetensors").read_bytes() == before
    assert main([*words, "--resume", "--lr", "0.1"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "imdn_x5"}, "Did you mean imdn_x"),
        ({"model": "ghostnetv2_100"}, "restores no images"),
        ({"recipe": "imnd"}, "Did you mean imdn"),
        ({"adapt": True}, "--weights"),
        ({"teacher_weights": "x"}, "--teacher"),
        ({"loss": "l3"}, "Expected one of"),
        ({"lr": -1.0}, "more than 0"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(UsageError, match=message):
        plan_training(TrainSROptions(**options))


def test_patches_and_teachers_that_do_not_fit(photographs, tmp_path):
    with pytest.raises(UsageError, match="multiple"):
        train_sr(photographs, TrainSROptions(model="imdn_rtc", patch=15), out=tmp_path / "a")
    assert (
        main(["train-sr", str(tmp_path / "none"), "--model", "imdn_rtc", "--out", str(tmp_path / "b")]) == 3
    )


def test_recipes_follow_the_paper_and_the_options():
    recipe, task = plan_training(TrainSROptions(model="imdn_x4"))
    assert (recipe.lr, recipe.batch_size, recipe.schedule, recipe.epochs) == (2e-4, 16, "halving", 1000)
    assert (task.patch, task.loss, task.frequency_weight) == (192, "l1", 0.0) and recipe.ema_decay is None
    recipe, task = plan_training(TrainSROptions(model="cfsr_x2", ema=0, lr=1e-3, patch=64, time_s=60))
    assert recipe.ema_decay is None and recipe.lr == 1e-3 and task.patch == 64 and recipe.time_budget_s == 60
    assert task.frequency_weight == 0.05
    assert plan_training(TrainSROptions(model="span_x4", adapt=True, weights="w"))[0].epochs == 100
