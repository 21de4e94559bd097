"""From folders, tables, archives and names to a data set, and what is said about bad ones."""

from __future__ import annotations

import csv
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data.images import open_image
from featherweight.data.preprocess import Preprocess
from featherweight.data.sources import load_dataset
from featherweight.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RNG = np.random.default_rng(0)


def picture(size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8))


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12) -> Path:
    for label in classes:
        (root / label).mkdir(parents=True)
        for number in range(count):
            picture().save(root / label / f"{number:02d}.png")
    return root


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared data set {name} is not beside the project")
    return SHARED / name


def names(split) -> set[str]:
    return {split.name(i) for i in range(len(split))}


def test_folder_of_classes_is_split(tmp_path: Path) -> None:
    data = load_dataset(make_folder(tmp_path / "pets", count=20))
    assert (data.name, data.classes, data.mode) == ("pets", ("cat", "dog"), "RGB")
    assert (len(data.train), len(data.val), len(data.test)) == (28, 6, 6)
    assert len(names(data.train) | names(data.val) | names(data.test)) == 40
    for split in (data.train, data.val, data.test):
        for i in range(len(split)):
            assert split.name(i).split("/")[0] == data.classes[split.labels[i]]
    again = load_dataset(tmp_path / "pets")
    other = load_dataset(tmp_path / "pets", seed=1)
    assert names(again.test) == names(data.test) != names(other.test)


@pytest.mark.parametrize("val", ["val", "valid", "validation", None])
def test_folder_with_splits(tmp_path: Path, val: str | None) -> None:
    for split in filter(None, ("train", val, "test")):
        make_folder(tmp_path / split)
    data = load_dataset(tmp_path)
    assert names(data.test) == {f"test/{c}/{i:02d}.png" for c in ("cat", "dog") for i in range(12)}
    assert len(data.val) == (24 if val else 4) and len(data.train) == (24 if val else 20)


def test_classes_called_train_and_test(tmp_path: Path) -> None:
    assert load_dataset(make_folder(tmp_path, ("train", "test"))).classes == ("test", "train")


def test_decode_equals_preprocess_and_pillow(tmp_path: Path) -> None:
    data = load_dataset(make_folder(tmp_path))
    pixels = data.train.decode((8, 9), "RGB")
    spec = Preprocess(size=(8, 9), mean=(0, 0, 0), std=(1, 1, 1))
    for i in range(len(data.train)):
        source = Image.open(tmp_path / data.train.name(i))
        by_hand = np.asarray(source.resize((9, 8), Image.Resampling.BILINEAR))
        assert np.array_equal(pixels[i], by_hand)
        tensor = spec.apply(data.train.images[i])
        np.testing.assert_allclose(tensor.transpose(1, 2, 0) * 255, by_hand, atol=1e-3)
    assert np.array_equal(data.train.subset([3, 1]).decode((8, 9)), pixels[[3, 1]])


def test_decode_is_the_same_without_room_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    roomy = load_dataset(tmp_path).train
    monkeypatch.setattr("featherweight.data.scan.CACHE_BYTES", 500)
    tight = load_dataset(tmp_path).train
    assert roomy.pixels is not None and tight.pixels is None
    for size in ((12, 10), (5, 5)):
        for mode in ("RGB", "L"):
            assert np.array_equal(roomy.decode(size, mode), tight.decode(size, mode))
    assert np.array_equal(np.asarray(roomy.image(3)), np.asarray(tight.image(3)))


def test_decoded_array_is_the_callers_own(tmp_path: Path) -> None:
    split = load_dataset(make_folder(tmp_path)).train
    first = split.decode((12, 10))
    first[:] = 0
    assert split.decode((12, 10)).any()


def test_grey_images_give_mode_l(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).convert("L").convert("RGB").save(path)
    data = load_dataset(tmp_path)
    assert data.mode == "L" and data.train.decode((6, 6), data.mode).shape == (len(data.train), 6, 6, 1)
    picture().save(tmp_path / "cat" / "00.png")
    assert load_dataset(tmp_path).mode == "RGB"


def test_bad_files_are_skipped_with_a_reason(tmp_path: Path) -> None:
    from test_images import bomb, encode

    make_folder(tmp_path)
    (tmp_path / "cat" / "text.jpg").write_text("this is text\n" * 50)
    (tmp_path / "cat" / "cut.jpg").write_bytes(encode(picture((64, 64)), "JPEG")[:900])
    (tmp_path / "cat" / "bomb.png").write_bytes(bomb())
    (tmp_path / "dog" / "empty.png").write_bytes(b"")
    (tmp_path / "dog" / "notes.txt").write_text("x")
    (tmp_path / "dog" / ".hidden.png").write_bytes(b"")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    data = load_dataset(tmp_path)
    reasons = dict(data.skipped)
    assert set(reasons) == {"cat/text.jpg", "cat/cut.jpg", "cat/bomb.png", "dog/empty.png", "dog/notes.txt"}
    assert "truncated" in reasons["cat/cut.jpg"] and "bomb" in reasons["cat/bomb.png"]
    assert data.summary()["images"]["total"] == 24 and any("5 file(s)" in text for text in data.warnings)


def test_strange_class_names(tmp_path: Path) -> None:
    strange = ("Köter & Hündin", "猫", "n" * 240, "emoji 🐈")
    data = load_dataset(make_folder(tmp_path, strange, count=10))
    assert set(data.classes) == set(strange) and data.summary()["balance"]["猫"]["train"] > 0


def test_duplicates_across_given_splits_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val", "test"):
        make_folder(tmp_path / split)
    for number in range(3):  # the same pixels in another file format
        Image.open(tmp_path / "train" / "cat" / f"{number:02d}.png").save(
            tmp_path / "test" / "cat" / f"x{number}.bmp"
        )
    with caplog.at_level(logging.WARNING, "featherweight"):
        data = load_dataset(tmp_path)
    assert data.duplicates == 3 and "3 image(s) of test" in caplog.text


def test_own_split_keeps_duplicates_together(tmp_path: Path) -> None:
    make_folder(tmp_path, count=15)
    for path in sorted(tmp_path.rglob("*.png")):
        path.with_name(f"copy_{path.name}").write_bytes(path.read_bytes())
    assert load_dataset(tmp_path).duplicates == 0


def test_small_and_empty_classes_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path, ("cat", "dog", "fox"))
    for number in range(5, 12):
        (tmp_path / "fox" / f"{number:02d}.png").unlink()
    (tmp_path / "owl").mkdir()
    data = load_dataset(tmp_path)
    text = " ".join(data.warnings)
    assert "fox (5)" in text and "owl" in text and data.classes == ("cat", "dog", "fox")


def test_one_class_no_images_no_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing"):
        load_dataset(tmp_path)
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="1 images but no class folders"):
        load_dataset(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images"):
        load_dataset(tmp_path)
    picture().save(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match="only one class"):
        load_dataset(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_text("text")
    with pytest.raises(DataError, match="only one class"):
        load_dataset(tmp_path)


def test_too_few_images_to_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few images"):
        load_dataset(make_folder(tmp_path, count=1))


def test_missing_path_suggests(tmp_path: Path) -> None:
    make_folder(tmp_path / "my_photos")
    with pytest.raises(DataError, match="Did you mean my_photos"):
        load_dataset(tmp_path / "my_photo")
    with pytest.raises(DataError, match="Did you mean digits"):
        load_dataset("digit")
    with pytest.raises(DataError):
        load_dataset("nul\0byte")
    with pytest.raises(DataError):
        load_dataset(tmp_path / ("x" * 5000))
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"'\.zip' file"):
        load_dataset(tmp_path / "a.zip")


def write_table(path: Path, rows: list[list[str]], header: tuple[str, ...] = ("path", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_csv(tmp_path: Path) -> None:
    make_folder(tmp_path)
    rows = [
        [f"{c}/{i:02d}.png", "Katze" if c == "cat" else "Hund"] for c in ("cat", "dog") for i in range(12)
    ]
    data = load_dataset(write_table(tmp_path / "t.csv", [*rows, ["cat/missing.png", "Katze"]]))
    assert data.classes == ("Hund", "Katze") and data.skipped[0][0] == "cat/missing.png"
    for i in range(len(data.train)):
        assert (data.train.labels[i] == 1) == data.train.name(i).startswith("cat")
    splits = [[*row, ("train", "test", "valid")[i % 3]] for i, row in enumerate(rows)]
    data = load_dataset(write_table(tmp_path / "s.csv", splits, ("Path", "Label", "Split")))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 8, 8)
    assert names(data.test) == {row[0] for row in splits if row[2] == "test"}


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "cat/../../x.png", "link/x.png"])
def test_csv_path_that_leaves_the_folder(tmp_path: Path, path: str) -> None:
    root = make_folder(tmp_path / "data")
    os.symlink(tmp_path, root / "link")
    table = write_table(root / "t.csv", [["cat/00.png", "a"], [path, "b"]])
    with pytest.raises(DataError, match=r"Row 3 .*outside"):
        load_dataset(table)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"path,label\n",
        b"path,label\nx.png,\n",
        b"path,label,split\nx.png,a,exam\n",
        b"\xff\xfe\x00path",
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError):
        load_dataset(tmp_path / "t.csv")


def test_names_and_imports() -> None:
    data = load_dataset("digits")
    assert len(data.classes) == 10 and data.mode == "L" and data.summary()["images"]["total"] == 1797
    from sklearn.datasets import load_digits

    truth = load_digits()
    i = int(data.test.index[5])
    assert np.array_equal(np.asarray(data.test.image(5)), np.rint(truth.images[i] / 16 * 255))
    assert data.test.labels[5] == truth.target[i]
    code = "import sys; from featherweight.data.sources import load_dataset; load_dataset('digits')"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("name", "counts", "classes"),
    [
        ("leaf_sugarcane", (220, 55), 3),
        ("gtsrb43", (2772, 1053), 43),
        ("blood_wbc", (680, 240), 4),
        ("mnist", (70_000, 10_000), 10),
        ("fashion_mnist", (70_000, 10_000), 10),
    ],
)
def test_shared_sets(name: str, counts: tuple[int, int], classes: int) -> None:
    data = load_dataset(shared(name))
    assert (data.summary()["images"]["total"], len(data.test), len(data.classes)) == (*counts, classes)
    assert data.mode == ("L" if "mnist" in name else "RGB")
    assert len(np.unique(data.val.labels)) == classes


def test_groups_of_shared_sets_stay_whole() -> None:
    for name, key in (("gtsrb43", "track_train"), ("blood_wbc", "source")):
        data = load_dataset(shared(name))
        file = shared(name) / ("gtsrb43.npz" if name == "gtsrb43" else "train.npz")
        groups = np.load(file)[key]
        pairs = [
            {(y, groups[i]) for y, i in zip(s.labels, s.index, strict=True)} for s in (data.train, data.val)
        ]
        assert not pairs[0] & pairs[1]


def test_offline_root_serves_the_names() -> None:
    shared("mnist"), shared("fashion_mnist")
    assert load_dataset("mnist", data_root=SHARED).test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    data = load_dataset("fashion-mnist", data_root=shared("fashion_mnist"))
    assert data.classes[9] == "Ankle boot"


def test_no_network_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="--data-root"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="Found no cifar10"):
        load_dataset("cifar10", data_root=tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(DataError, match=r"Cannot download cifar10 .*--data-root"):
        load_dataset("cifar10")


def test_torchvision_layout_serves_offline(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 200), ("t10k", 50)):
        images = RNG.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], ">i4").tobytes() + labels.tobytes()
        )
    data = load_dataset("mnist", data_root=tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (170, 30, 50)
    assert np.array_equal(np.asarray(data.test.image(7)), images[7]) and data.test.labels[7] == 7


@pytest.mark.slow
def test_cifar10_decodes_right() -> None:
    data = load_dataset("cifar10", data_root=shared("cifar10"))
    assert (len(data.train), len(data.val), len(data.test)) == (45_000, 5_000, 10_000)
    archive = np.load(shared("cifar10") / "test.npz")
    bytes_, offsets = archive["data"], archive["offsets"]
    pixels = data.test.decode((32, 32), "RGB")
    for i in RNG.integers(0, 10_000, 50):
        content = bytes_[offsets[i] : offsets[i + 1]].tobytes()
        assert np.array_equal(pixels[i], np.asarray(Image.open(io.BytesIO(content))))
        assert data.test.labels[i] == archive["labels"][i]
        assert np.array_equal(np.asarray(open_image(data.test.images[i])), pixels[i])
