"""Pictures for training: any folder or zip, bad files left out, small pictures grown, spilling to a file."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from featherweight.data import pictures
from featherweight.data.bicubic import imresize
from featherweight.data.pictures import list_pictures, load_pictures
from featherweight.errors import DataError


@pytest.fixture
def folder(tmp_path):
    noise = np.random.RandomState(0)
    for name, size in (("b/wide.png", (37, 50, 3)), ("a.jpg", (40, 31, 3)), ("tiny.png", (5, 9, 3))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise.randint(0, 256, size).astype(np.uint8)).save(tmp_path / name)
    Image.fromarray(noise.randint(0, 256, (33, 33)).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(noise.randint(0, 65536, (33, 34)).astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_every_usable_picture_is_read_and_the_others_are_reported(folder):
    seen = []
    found = load_pictures(folder, 3, 24, progress=lambda *now: seen.append(now))
    assert found.names == ("a.jpg", "b/wide.png", "deep.png", "grey.png", "tiny.png")
    assert [name for name, _ in found.skipped] == ["broken.jpg", "empty.png"]
    assert "0 bytes" in found.skipped[1][1] and seen[-1] == (7, 7)
    for high, low in zip(found.high, found.low, strict=True):
        assert high.dtype == np.uint8 and high.shape[2] == 3 and min(high.shape[:2]) >= 24
        assert high.shape[:2] == tuple(3 * side for side in low.shape[:2])
    wide = np.asarray(Image.open(folder / "b" / "wide.png"))[:36, :48]
    assert np.array_equal(found.high[1], wide) and np.array_equal(found.low[1], imresize(wide, 1 / 3))
    tiny = np.asarray(Image.open(folder / "tiny.png"))
    assert np.array_equal(found.high[4][:5, :9], tiny) and np.array_equal(found.high[4][5:10, :9], tiny[::-1])


def test_zip_files_and_single_files_are_places_too(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("zip")
    with zipfile.ZipFile(other / "set.zip", "w") as archive:
        for name in ("grey.png", "notes.txt", "a.jpg"):
            archive.write(folder / name, f"inside/{name}")
    for place in (other, other / "set.zip"):
        assert load_pictures(place, 2, 8).names == ("inside/a.jpg", "inside/grey.png")
    assert load_pictures(folder / "grey.png", 1, 8).names == ("grey.png",)
    assert load_pictures(folder, 2, 8, limit=2).names == ("a.jpg", "b/wide.png")


def test_same_pictures_have_the_same_fingerprint(folder):
    one, two = load_pictures(folder, 2, 8), load_pictures(folder, 2, 8)
    assert one.fingerprint() == two.fingerprint() != load_pictures(folder, 4, 8).fingerprint()
    assert one.take([1, 2]).names == ("b/wide.png", "deep.png")
    assert one.take([1, 2]).fingerprint() != one.fingerprint()


def test_pictures_beyond_the_memory_lie_in_a_file(folder, monkeypatch):
    kept = load_pictures(folder, 2, 8)
    monkeypatch.setattr(pictures, "MEMORY_BYTES", 6000)
    spilled = load_pictures(folder, 2, 8, spill=folder / "run" / "pixels.raw")
    assert isinstance(spilled.high[-1], np.memmap) and not isinstance(spilled.high[0], np.memmap)
    assert all(
        np.array_equal(a, b) for a, b in zip(kept.high + kept.low, spilled.high + spilled.low, strict=True)
    )


def test_places_without_pictures(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="holds no picture"):
        list_pictures(empty)
    with pytest.raises(DataError, match="No pictures at"):
        list_pictures(empty / "missing")
    (empty / "x.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="no readable zip"):
        list_pictures(empty / "x.zip")
    (empty / "only.png").touch()
    with pytest.raises(DataError, match="can be used"):
        load_pictures(empty / "only.png", 2, 8)
