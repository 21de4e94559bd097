"""Archives of every accepted layout, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import encode

from featherweight.data.sources import load_dataset
from featherweight.errors import DataError

RNG = np.random.default_rng(0)
LABELS = np.arange(40) % 4


def colour(count: int = 40) -> np.ndarray:
    return RNG.integers(0, 256, (count, 6, 5, 3), np.uint8)


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def all_pixels(data) -> np.ndarray:
    """Return the images of a set that was split from one array, in the array's order."""
    out = np.zeros((40, 6, 5, 3), np.uint8)
    for split in (data.train, data.val, data.test):
        out[split.index] = split.decode((6, 5), "RGB")
    return out


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("kind", ["uint8", "unit float", "byte float", "int64", "channels first", "uint16"])
def test_array_kinds(tmp_path: Path, keys: tuple[str, str], kind: str) -> None:
    pixels = colour()
    stored = {
        "uint8": pixels,
        "unit float": (pixels / 255).astype(np.float32),
        "byte float": pixels.astype(np.float64),
        "int64": pixels.astype(np.int64),
        "channels first": pixels.transpose(0, 3, 1, 2),
        "uint16": pixels.astype(np.uint16) * 257,
    }[kind]
    data = load_dataset(save(tmp_path / "a.npz", **{keys[0]: stored, keys[1]: LABELS}))
    assert np.array_equal(all_pixels(data), pixels)
    assert data.classes == ("0", "1", "2", "3")


def test_range_is_judged_over_both_splits(tmp_path: Path) -> None:
    dim, bright = RNG.integers(0, 2, (40, 4, 4)).astype(float), np.zeros((40, 4, 4))
    bright[:, 0, 0] = 200.0
    data = load_dataset(save(tmp_path / "a.npz", x_train=dim, y_train=LABELS, x_test=bright, y_test=LABELS))
    assert data.train.decode((4, 4), "L").max() == 1 and data.test.decode((4, 4), "L").max() == 200


def test_transparent_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((40, 4, 4, 4), np.uint8)
    pixels[:20, ..., 0] = 200
    pixels[:, 0, 0] = RNG.integers(0, 256, (40, 4))
    pixels[:20, 1:, :, 3] = 255
    data = load_dataset(save(tmp_path / "a.npz", x=pixels, y=(np.arange(40) >= 20).astype(int)), seed=1)
    for i, label in enumerate(data.train.labels):
        expected = (255, 255, 255) if label else (200, 0, 0)
        assert data.train.image(i).getpixel((1, 1)) == expected
        assert tuple(data.train.decode((4, 4))[i, 1, 1]) == expected


def test_encoded_images_and_names(tmp_path: Path) -> None:
    pixels = colour()
    files = [encode(Image.fromarray(image)) for image in pixels]
    files[3] = files[3][:40]
    offsets = np.cumsum([0, *map(len, files)])
    joined = np.frombuffer(b"".join(files), np.uint8)
    path = save(
        tmp_path / "a.npz", data=joined, offsets=offsets, labels=LABELS.astype(np.uint8), classes=list("wxyz")
    )
    data = load_dataset(path)
    assert data.classes == tuple("wxyz") and data.skipped[0][0] == "image/000003"
    expected = pixels.copy()
    expected[3] = 0
    assert np.array_equal(all_pixels(data), expected)


def test_labels_as_text_and_sparse_numbers(tmp_path: Path) -> None:
    text = np.array(["b", "a", "c", "a"])[LABELS]
    assert load_dataset(save(tmp_path / "a.npz", x=colour(), y=text)).classes == ("a", "b", "c")
    data = load_dataset(save(tmp_path / "b.npz", x=colour(), y=LABELS * 10 + 2))
    assert data.classes == ("2", "12", "22", "32") and set(data.train.labels) == {0, 1, 2, 3}


def test_three_splits_and_folder_of_archives(tmp_path: Path) -> None:
    arrays = {
        f"{key}_{split}": value
        for split in ("train", "val", "test")
        for key, value in (("x", colour()), ("y", LABELS))
    }
    data = load_dataset(save(tmp_path / "a.npz", **arrays))
    assert (len(data.train), len(data.val), len(data.test)) == (40, 40, 40)
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        save(folder / f"{split}.npz", x=colour(), y=LABELS, classes=list("abcd"))
    data = load_dataset(folder)
    assert (data.name, len(data.val), data.classes) == ("set", 40, tuple("abcd"))
    save(folder / "test.npz", x=colour(), y=LABELS, classes=list("dcba"))
    with pytest.raises(DataError, match="other classes"):
        load_dataset(folder)


def test_groups_stay_on_one_side(tmp_path: Path) -> None:
    groups = np.arange(40) // 8 * 8 + LABELS  # two images per group
    data = load_dataset(save(tmp_path / "a.npz", x=colour(), y=LABELS, group=groups))
    sides = [set(groups[split.index]) for split in (data.train, data.val, data.test)]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def bad_float(value: float) -> np.ndarray:
    pixels = np.zeros((40, 4, 4))
    pixels[7, 1, 1] = value
    return pixels


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": bad_float(np.nan), "y": LABELS}, "NaN"),
        ({"x": bad_float(np.inf), "y": LABELS}, "infinite"),
        ({"x": bad_float(-1), "y": LABELS}, "Expected"),
        ({"x": bad_float(999), "y": LABELS}, "Expected"),
        ({"x": colour(), "y": LABELS[:9]}, "9 labels"),
        ({"x": colour(), "y": LABELS - 1}, "from 0"),
        ({"x": colour(), "y": LABELS + 0.5}, "fractions"),
        ({"x": colour(), "y": np.full(40, np.nan)}, "NaN"),
        ({"x": colour(), "y": np.eye(4)[LABELS]}, "one class number"),
        ({"x": colour(), "y": LABELS, "classes": np.array(["a", "b"])}, "names 2 classes"),
        ({"x": colour(), "y": LABELS * 0}, "only one class"),
        ({"x": np.zeros((40, 0, 0)), "y": LABELS}, "shape"),
        ({"x": np.zeros((40, 9)), "y": LABELS}, "shape"),
        ({"x": np.zeros((0, 4, 4)), "y": LABELS[:0]}, "shape"),
        ({"x_train": colour(), "x_test": colour()}, "no labels"),
        ({"pictures": colour()}, "holds the keys pictures"),
        ({"x": np.array([{}] * 40), "y": LABELS}, "pickled"),
        ({"data": np.zeros(9, np.uint8), "offsets": np.array([0, 5, 3]), "labels": LABELS[:2]}, "rise"),
        ({"data": np.zeros(9, np.uint8), "offsets": np.array([0, 99]), "labels": LABELS[:1]}, "rise"),
        ({"data": np.zeros(9), "offsets": np.array([0, 9]), "labels": LABELS[:1]}, "wrong shape or type"),
    ],
)
def test_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(save(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"numpy\.savez"):
        load_dataset(tmp_path / "a.npz")
