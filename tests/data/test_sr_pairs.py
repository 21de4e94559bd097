"""Super-resolution test sets in the layouts that are found in the wild."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data.sr_pairs import find_sr_set, sr_pairs
from featherweight.errors import DataError


def png(height: int, width: int, value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


LAYOUTS = {
    "beside": ("x2/img_001_HR.png", "x2/img_001_LR.png"),
    "folders": ("HR/img_001.png", "LRx2/img_001.png"),
    "div2k": ("HR/img_001.png", "LR_bicubic/X2/img_001x2.png"),
    "basicsr": ("GTmod12/img_001.png", "LRbicx2/img_001.png"),
    "plain": ("HR/img_001.png", "LR/img_001.png"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("packed", [False, True])
def test_layouts(layout: str, packed: bool, tmp_path: Path) -> None:
    high, low = LAYOUTS[layout]
    members = {high: png(9, 12, 200), low: png(4, 6, 100)}
    # the same picture for another scale must not be mixed in
    if layout != "plain":
        other = {
            name.replace("x2", "x4").replace("X2", "X4"): png(2, 3, 50) for name in members if "2" in name
        }
        members |= {name: content for name, content in other.items() if name not in members}
    folder = fill(tmp_path / "set", members)
    if packed:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        folder = find_sr_set(tmp_path / "set.zip")
    (pair,) = sr_pairs(folder, 2)
    assert pair.name == "img_001"
    assert pair.high.shape == (9, 12, 3) and pair.high[0, 0, 0] == 200
    assert pair.low is not None and pair.low.shape == (4, 6, 3) and pair.low[0, 0, 0] == 100


def test_large_pictures_alone(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", {"b.png": png(5, 5, 2), "deep/a.png": png(6, 6, 1), "notes.txt": b"x"})
    assert [(pair.name, pair.low) for pair in sr_pairs(folder, 3)] == [("a", None), ("b", None)]


def test_sets_by_name(tmp_path: Path) -> None:
    place = tmp_path / "set5"
    place.mkdir()
    with zipfile.ZipFile(place / "set5.zip", "w") as archive:
        archive.writestr("x2/img_001_HR.png", png(4, 4, 9))
    assert find_sr_set("set5", tmp_path) == place / "set5.zip" == find_sr_set(place)


def test_sets_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-root"):
        find_sr_set("set5")
    with pytest.raises(DataError, match="no large picture for scale 3"):
        list(sr_pairs(fill(tmp_path / "a", {"x2/i_HR.png": png(4, 4, 0)}), 3))
    with pytest.raises(DataError, match="for some only; b"):
        members = {"HR/a.png": png(4, 4, 0), "HR/b.png": png(4, 4, 0), "LR/a.png": png(2, 2, 0)}
        list(sr_pairs(fill(tmp_path / "b", members), 2))
    with pytest.raises(DataError, match="not 2 times"):
        list(sr_pairs(fill(tmp_path / "c", {"HR/a.png": png(9, 4, 0), "LR/a.png": png(2, 2, 0)}), 2))
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="no readable zip"):
        list(sr_pairs(tmp_path / "bad.zip", 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no large picture"):
        list(sr_pairs(tmp_path / "empty", 2))
