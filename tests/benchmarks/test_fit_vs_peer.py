"""The comparison with a plain timm pipeline: its bookkeeping, its batches, and a short real run."""

from __future__ import annotations

import csv
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight.data.preprocess import Preprocess
from featherweight.data.sources import load_dataset
from featherweight.errors import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("fit_vs_peer")


@pytest.fixture(scope="module")
def peer(bench):
    return importlib.import_module("timm_peer")


def row(system="featherweight", variant="int8", accuracy="0.9000", data="digits"):
    return {"data": data, "system": system, "variant": variant, "accuracy": accuracy}


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def merge(bench, text, rows):
    return importlib.import_module("side_by_side").merge_rows(text, rows, bench.KEY, bench.COLUMNS)


def test_merge_adds_and_replaces_rows_by_key(bench):
    text = merge(bench, "", [row(), row("peer"), row("peer", "float32")])
    text = merge(bench, text, [row("peer", accuracy="0.9500"), row(data="a, set with a comma")])
    seen = {(r["data"], r["system"], r["variant"]): r["accuracy"] for r in read(text)}
    assert seen == {
        ("digits", "featherweight", "int8"): "0.9000",
        ("digits", "peer", "int8"): "0.9500",
        ("digits", "peer", "float32"): "0.9000",
        ("a, set with a comma", "featherweight", "int8"): "0.9000",
    }
    assert text.splitlines()[0].split(",") == list(bench.COLUMNS)
    assert merge(bench, text, []) == text


def test_prepared_grey_images_become_three_equal_channels(peer):
    dataset = load_dataset("digits")
    data = peer.prepare(dataset.val, 16, dataset.mode)
    assert data.images.shape == (len(dataset.val), 1, 16, 16) and data.images.dtype == torch.uint8
    mean, std = peer.statistics_of(data)
    spec = Preprocess(size=(16, 16), mean=mean, std=std, mode="RGB")
    batch = peer.to_input(data.images[:4], spec)
    assert batch.shape == (4, 3, 16, 16)
    expected = np.stack([spec.apply(dataset.val.image(i)) for i in range(4)])
    np.testing.assert_allclose(batch.numpy(), expected, atol=1e-5)


def test_statistics_normalise_colour_images(peer):
    images = torch.randint(0, 255, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    images[:, 1] //= 4
    data = peer.PeerData(images, torch.zeros(64, dtype=torch.int64))
    mean, std = peer.statistics_of(data)
    batch = peer.to_input(images, Preprocess(size=(16, 16), mean=mean, std=std))
    torch.testing.assert_close(batch.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_crops_shift_each_image_by_itself_and_flip_only_when_asked(peer):
    ramp = torch.arange(16).float().expand(64, 1, 16, 16).byte()
    out = peer.crop_and_flip(ramp, False, torch.Generator().manual_seed(0))
    assert out.shape == ramp.shape
    shifts = out[:, 0, 8, 8] - 8
    assert set(shifts.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert (out[:, 0, 8, 9] > out[:, 0, 8, 8]).all()
    mirrored = peer.crop_and_flip(ramp, True, torch.Generator().manual_seed(0))
    falling = (mirrored[:, 0, 8, 9] < mirrored[:, 0, 8, 8]).float().mean()
    assert 0.2 < falling < 0.8


def test_reading_a_folder_without_a_run_says_so(bench, tmp_path):
    with pytest.raises(UsageError, match="no finished run"):
        bench.read_fit(tmp_path, load_dataset("digits"), 0, 60.0)


@pytest.mark.slow
def test_peer_learns_digits_in_seconds(bench, tmp_path):
    pytest.importorskip("timm")
    dataset = load_dataset("digits")
    result = bench.run_peer(dataset, "mobilenetv3_small_050", 32, 5.0, 0, tmp_path)
    rows = bench.measure([result], dataset, 0, 5.0)
    assert [r["variant"] for r in rows] == ["float32", "int8"]
    sizes = {r["variant"]: r["size_bytes"] for r in rows}
    assert sizes["int8"] < 0.5 * sizes["float32"]
    for r in rows:
        assert float(r["accuracy_low"]) <= float(r["accuracy"]) <= float(r["accuracy_high"])
        assert set(r) == set(bench.COLUMNS)
    assert read(merge(bench, "", rows))[0]["data"] == "digits"
