"""Tiles against the whole picture: cuts, seams, averages, depths and channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_restorers import picture, write_restorer

from featherweight.data.bicubic import imresize
from featherweight.workflows.restorers import Runner, find_restorer
from featherweight.workflows.tiling import MAX_ROUNDS, Tiles, plan_tiles, windows


def make(path: Path, pixels: np.ndarray, tile: int | None, margin: int | None = None, **network) -> Tiles:
    file = path / f"{abs(hash(str(network)))}.onnx"
    restorer = find_restorer(file if file.is_file() else write_restorer(file, **network))
    return Tiles(pixels, Runner(restorer, "onnxruntime"), tile, margin, 1 << 30)


def whole(tiles: Tiles) -> np.ndarray:
    return np.concatenate(list(tiles.strips()))


@pytest.mark.parametrize(
    ("length", "tile", "margin"), [(5, 8, 2), (8, 8, 2), (9, 8, 2), (100, 8, 3), (101, 32, 0)]
)
def test_windows_keep_every_pixel_once_with_its_margin(length: int, tile: int, margin: int) -> None:
    found = windows(length, tile, margin)
    assert [w.first for w in found] == [0, *(w.last for w in found)][:-1] and found[-1].last == length
    for window in found:
        assert window.stop - window.start == min(tile, length)
        assert 0 <= window.start <= window.first < window.last <= window.stop <= length
        assert window.start == 0 or window.first - window.start >= margin
        assert window.stop == length or window.stop - window.last >= margin


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_give_the_whole(scale: int, stride: int, tmp_path: Path) -> None:
    pixels = picture(45, 70)
    about = {"scale": scale, "stride": stride}
    expected = whole(make(tmp_path, pixels, 0, **about))
    tiles = make(tmp_path, pixels, 24, **about)
    assert tiles.plan.tiles > 6 and expected.shape == (45 * scale, 70 * scale, 3)
    got = whole(tiles)
    assert np.abs(got.astype(int) - expected).max() <= 1 and (got != expected).mean() < 1e-3
    seams = whole(make(tmp_path, pixels, 24, 0, **about))
    assert np.abs(seams.astype(int) - expected).max() > 3, "without a margin the seams show"


def test_averages_are_those_of_the_whole_picture(tmp_path: Path) -> None:
    pixels = picture(64, 96)
    pixels[:, 60:] //= 4  # a bright and a dark half
    expected = whole(make(tmp_path, pixels, 0, attention=True))
    tiles = make(tmp_path, pixels, 24, attention=True)
    got = whole(tiles)
    assert 1 <= tiles.rounds < MAX_ROUNDS
    assert np.abs(got.astype(int) - expected).max() <= 1
    tiles._shares = False
    alone = np.concatenate(list(tiles.strips()))
    assert np.abs(alone.astype(int) - expected).max() > 3, "each tile by its own averages shows"


def test_averages_on_the_compiled_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.workflows.restorers import has_compiler

    if not has_compiler():
        pytest.skip("no C compiler")
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    pixels = picture(40, 56)
    restorer = find_restorer(write_restorer(tmp_path / "a.onnx", attention=True, stride=2))
    compiled, runtime = Runner(restorer, "compiled"), Runner(restorer, "onnxruntime")
    got, expected = (whole(Tiles(pixels, runner, 24, None, 1 << 30)) for runner in (compiled, runtime))
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert compiled.used["compiled"] > 0
    again = Runner(restorer, "auto")
    whole(Tiles(pixels, again, 24, None, 1 << 30))
    assert again.used.get("compiled"), "what was compiled before is used"


def test_sixteen_bits_lose_nothing(tmp_path: Path) -> None:
    deep = picture(20, 30, dtype="uint16")
    got = whole(make(tmp_path, deep, 16))
    assert got.dtype == np.uint16
    import onnxruntime

    session = onnxruntime.InferenceSession(next(tmp_path.glob("*.onnx")))
    feed = (deep / np.float32(65535)).astype(np.float32).transpose(2, 0, 1)[None]
    exact = session.run(None, {"image": feed})[0][0].transpose(1, 2, 0).clip(0, 1) * 65535
    assert np.abs(got - exact).max() <= 1
    assert len(np.unique(got)) > 600


def test_grey_stays_grey_and_luma_networks_take_colour(tmp_path: Path) -> None:
    grey = picture(20, 30, 1)
    assert whole(make(tmp_path, grey, 16)).shape == (40, 60, 1)
    colour = picture(30, 40)
    got = whole(make(tmp_path, colour, 20, channels=1))
    expected = whole(make(tmp_path, colour, 0, channels=1))
    assert np.abs(got.astype(int) - expected).max() <= 1
    smooth = imresize(colour, 2).astype(float)
    chroma = [image[..., 0] - image[..., 2] for image in (got.astype(float), smooth)]
    inner = (got > 0).all(-1) & (got < 255).all(-1)
    assert np.abs(chroma[0] - chroma[1])[inner].max() <= 2, "the colour is the bicubic one"


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 200)])
def test_pictures_thinner_than_a_kernel(shape: tuple[int, int], tmp_path: Path) -> None:
    pixels = picture(*shape)
    assert whole(make(tmp_path, pixels, None, stride=2)).shape == (shape[0] * 2, shape[1] * 2, 3)
    expected = whole(make(tmp_path, pixels, 0))
    assert np.abs(whole(make(tmp_path, pixels, 16)).astype(int) - expected).max() <= 1


def test_files_of_one_size_are_tiles_of_that_size(tmp_path: Path) -> None:
    tiles = make(tmp_path, picture(50, 30), None, size=(24, 40))
    assert tiles.plan.shape == (24, 40)
    assert whole(tiles).shape == (100, 60, 3)
    free = whole(make(tmp_path, picture(50, 30), 0))
    # below and to the right the picture was extended to the file's size
    assert np.abs(whole(tiles)[:, :50].astype(int) - free[:, :50]).max() <= 1


def test_memory_decides_between_the_whole_and_tiles(tmp_path: Path) -> None:
    plain = find_restorer(write_restorer(tmp_path / "a.onnx"))
    gated = find_restorer(write_restorer(tmp_path / "b.onnx", attention=True))
    plenty, little = 1 << 34, 20 << 20
    assert plan_tiles(plain, 300, 300, None, 3, plenty).tiles == 1
    assert plan_tiles(plain, 3000, 4000, None, 3, plenty).shape == (384, 384)
    assert plan_tiles(gated, 3000, 4000, None, 3, plenty).tiles == 1
    shape = plan_tiles(gated, 3000, 4000, None, 3, little).shape
    assert shape[0] ** 2 * gated.bytes_per_pixel <= little


def test_progress_counts_every_pixel(tmp_path: Path) -> None:
    seen: list[int] = []
    tiles = make(tmp_path, picture(45, 70), 24)
    assert len(list(tiles.strips(seen.append))) == len(tiles.plan.rows)
    assert sum(seen) == 90 * 140
