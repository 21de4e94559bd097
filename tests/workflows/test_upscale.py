"""`upscale` on files: what is kept, what is named how, and everything that people give by mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_restorers import picture, write_restorer

import featherweight
from featherweight.data.photos import EXIF_IFD, EXIF_WIDTH, read_photo
from featherweight.data.transparency import fill_clear
from featherweight.errors import CheckpointError, DataError, UsageError, WriteError
from featherweight.workflows.upscale import Upscaler, choose_model, upscale

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return write_restorer(tmp_path / "tiny.onnx")


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).save(
        path, **options
    )
    return path


def go(network: Path, *inputs: Path, **options):
    return upscale(list(inputs), model=network, engine="onnxruntime", **options)


def test_result_goes_beside_the_picture(network: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "in" / "a.PNG", picture(20, 30))
    result = go(network, source)
    (done,) = result.done
    assert done.target == tmp_path / "in" / "a_x2.PNG" and done.result_size == (40, 60)
    expected = Upscaler(network, engine="onnxruntime").enlarge(picture(20, 30))
    assert np.array_equal(np.asarray(Image.open(done.target)), expected)
    assert result.to_dict()["done"][0]["result"] == str(done.target)


def test_folders_go_into_a_folder_of_their_own(network: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save(folder / "a.png", picture(9, 9))
    save(folder / "deep" / "a.png", picture(9, 9))
    (folder / "notes.txt").write_text("x")
    assert [d.target for d in go(network, folder).done] == [tmp_path / "photos_x2" / "a_x2.png"]
    result = go(network, folder, out=tmp_path / "out", recursive=True)
    assert {d.target.relative_to(tmp_path / "out").as_posix() for d in result.done} == {
        "a_x2.png",
        "deep/a_x2.png",
    }
    inside = go(network, folder, out=folder / "big", recursive=True)
    again = go(network, folder, out=folder / "big", recursive=True)
    assert len(inside.done) == 2 and len(again.existing) == 2, "results within are no inputs"


def test_nothing_is_overwritten_unless_asked(network: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", picture(9, 9))
    target = tmp_path / "a_x2.png"
    target.write_text("mine")
    result = go(network, source)
    assert result.existing == [target] and not result.done and target.read_text() == "mine"
    assert go(network, source, overwrite=True).done[0].target == target
    assert Image.open(target).size == (18, 18)


def test_the_output_may_not_be_an_input(network: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", picture(9, 9))
    before = source.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="would replace the input"):
            go(network, source, out=source, overwrite=overwrite)
    assert source.read_bytes() == before


def test_two_inputs_may_not_share_a_result(network: Path, tmp_path: Path) -> None:
    pair = [save(tmp_path / name / "a.png", picture(9, 9)) for name in ("one", "two")]
    with pytest.raises(UsageError, match="would both become"):
        go(network, *pair, out=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "said before anything is computed"
    kinds = [save(tmp_path / f"b.{kind}", picture(9, 9)) for kind in ("jpg", "png")]
    with pytest.raises(UsageError, match="would both become"):
        go(network, *kinds, format="png")


def test_unreadable_pictures_are_reported_and_the_others_written(network: Path, tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg", picture(30, 30))
    bad = {"empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": good.read_bytes()[:-200]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    result = go(network, *[tmp_path / name for name in bad], good, tmp_path / "gone.png")
    assert [d.source for d in result.done] == [good]
    reasons = {entry.source.name: entry.reason for entry in result.failed}
    assert set(reasons) == {*bad, "gone.png"}
    assert "0 bytes" in reasons["empty.jpg"] and "Cannot read" in reasons["gone.png"]
    assert {path.name for path in tmp_path.glob("*_x2*")} == {"good_x2.jpg"}, "no half of a cut one"


def test_places_that_cannot_be_written_are_found_first(network: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "a.png", picture(9, 9))
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="no writable folder"):
        go(network, source, out=tmp_path / "file" / "deeper")


def test_folders_without_pictures_and_no_input(network: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        go(network, tmp_path / "empty")
    with pytest.raises(UsageError, match="No picture"):
        go(network)


def test_everything_of_a_photograph_is_kept(network: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "Model", 6
    exif.get_ifd(EXIF_IFD)[EXIF_WIDTH] = 30
    source = save(tmp_path / "a.jpg", picture(20, 30), exif=exif, dpi=(300, 300), quality=95)
    (done,) = go(network, source).done
    assert done.size == (30, 20) and done.result_size == (60, 40), "upright"
    photo = read_photo(done.target)
    assert (photo.format, photo.dpi, photo.exif[0x0112], photo.exif[0x0110]) == (
        "JPEG",
        (300, 300),
        1,
        "Model",
    )
    assert photo.exif.get_ifd(EXIF_IFD)[EXIF_WIDTH] == 40
    turned = np.asarray(Image.open(source)).swapaxes(0, 1)[:, ::-1]
    expected = Upscaler(network, engine="onnxruntime").enlarge(np.ascontiguousarray(turned))
    assert np.abs(photo.pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_stay(kind: str, network: Path, tmp_path: Path) -> None:
    deep = picture(16, 20, 1, "uint16")[:, :, 0]
    (done,) = go(network, save(tmp_path / f"a.{kind}", deep)).done
    got = read_photo(done.target).pixels
    assert got.dtype == np.uint16
    assert np.array_equal(got[:, :, 0], Upscaler(network, engine="onnxruntime").enlarge(deep))
    jpeg = go(network, save(tmp_path / f"b.{kind}", deep), format="jpeg").done[0]
    assert any("16 bits became 8" in note for note in jpeg.notes)


def test_transparency_is_enlarged_and_does_not_bleed(network: Path, tmp_path: Path) -> None:
    pixels = np.full((24, 24, 3), 200, np.uint8)
    alpha = np.zeros((24, 24), np.uint8)
    alpha[6:18, 6:18] = 255
    pixels[alpha == 0] = 0  # black hides under the clear part
    (done,) = go(network, save(tmp_path / "a.png", np.dstack([pixels, alpha]))).done
    got = read_photo(done.target)
    flat = Upscaler(network, engine="onnxruntime").enlarge(np.full((24, 24, 3), 200, np.uint8))
    seen = got.alpha > 0
    assert np.abs(got.pixels.astype(int) - flat)[seen].max() <= 1
    assert got.alpha[24, 24] == 255 and got.alpha[0, 0] == 0
    white = go(network, save(tmp_path / "b.png", np.dstack([pixels, alpha])), format="jpeg").done[0]
    assert np.asarray(Image.open(white.target))[0, 0].min() > 250 and "white" in white.notes[0]


def test_hidden_colours_are_filled_from_the_nearest() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    alpha = np.zeros((40, 40), np.uint8)
    pixels[5, 5], alpha[5, 5] = (250, 10, 20), 1
    pixels[30, 30], alpha[30, 30] = (20, 240, 10), 255
    filled = fill_clear(pixels, alpha)
    assert filled[4, 5].tolist() == [250, 10, 20] and filled[31, 31].tolist() == [20, 240, 10]
    assert np.array_equal(filled[alpha > 0], pixels[alpha > 0])
    assert fill_clear(pixels, np.zeros_like(alpha)) is pixels


def test_kinds_that_are_not_written_become_png(network: Path, tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(12, 12, 1)[:, :, 0]) for _ in range(2)]
    frames[1].putpixel((0, 0), 0)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (done,) = go(network, tmp_path / "a.gif").done
    assert done.target.name == "a_x2.png" and len(done.notes) == 2
    assert "first of 2 frames" in done.notes[1]


def test_one_pixel_and_a_long_strip(network: Path, tmp_path: Path) -> None:
    save(tmp_path / "dot.png", picture(1, 1))
    save(tmp_path / "strip.jpg", picture(4, 60_000))
    result = go(network, tmp_path / "dot.png", tmp_path / "strip.jpg")
    assert [d.result_size for d in result.done] == [(2, 2), (8, 120_000)]
    assert result.done[1].target.suffix == ".png" and "65,500" in result.done[1].notes[0]
    forced = go(network, tmp_path / "strip.jpg", format="jpeg")
    assert "--format png" in forced.failed[0].reason


def test_scales_that_a_network_does_not_have(network: Path) -> None:
    with pytest.raises(UsageError, match="enlarges 2 times; 4 was asked"):
        Upscaler(network, scale=4)
    with pytest.raises(UsageError, match="There is no cfsr_x7"):
        Upscaler("cfsr", scale=7)
    with pytest.raises(UsageError, match="Did you mean cfsr_x"):
        choose_model("cfsr_x9", None)
    assert choose_model(None, None) == "cfsr_x4"


def test_networks_that_keep_the_size_take_any_scale(tmp_path: Path) -> None:
    keeps = write_restorer(tmp_path / "keeps.onnx", scale=1, stride=2)
    (done,) = go(keeps, save(tmp_path / "a.png", picture(20, 31)), scale=2.5).done
    assert done.result_size == (50, 78) and done.target.name == "a_x2.5.png"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 6}, "twice the overlap"),
        ({"format": "bmp"}, "Format 'bmp'"),
        ({"quality": 0}, "Quality"),
        ({"weights": "w.pth"}, "weights already"),
        ({"out": "a.xyz.gif"}, "Cannot write .gif"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str, network: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        go(network, save(tmp_path / "a.png", picture(9, 9)), **options)


def test_engines_are_checked(network: Path) -> None:
    with pytest.raises(UsageError, match="Engine 'gpu'"):
        Upscaler(network, engine="gpu")


def test_files_that_are_no_such_network(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(DataError, match="cannot load"):
        Upscaler(tmp_path / "text.onnx")
    with pytest.raises(DataError, match="No ONNX file"):
        Upscaler(tmp_path / "gone.onnx")
    with pytest.raises(UsageError, match="No super-resolution"):
        Upscaler("mobilenetv2_100")


def test_missing_weights_offline_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE.*--weights FILE"):
        Upscaler("cfsr_x4")
    with pytest.raises(CheckpointError, match="No weights at"):
        Upscaler("cfsr_x4", weights=tmp_path / "gone.pth")


def test_report_shows_each_picture(network: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture(120, 130))
    save(tmp_path / "in" / "b.png", picture(20, 30, 1, "uint16")[:, :, 0])
    go(network, tmp_path / "in", report=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count('type="range"') == 2 and "130 x 120 pixels became 260 x 240" in page


def test_arrays_and_what_is_none(network: Path) -> None:
    upscaler = Upscaler(network, engine="onnxruntime")
    assert upscaler.enlarge(picture(9, 8)[:, :, 0]).shape == (18, 16)
    for wrong in (np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), np.zeros(4, np.uint8)):
        with pytest.raises(DataError, match="Cannot enlarge"):
            upscaler.enlarge(wrong)
    assert featherweight.upscale is upscale


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the official weights are not beside the project")
def test_second_run_of_a_registry_network_needs_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    source = save(tmp_path / "a.png", picture(16, 20))
    weights = WEIGHTS / "DSCF_x4.pth"
    first = upscale(source, out=tmp_path / "1.png", model="dscf_x4", weights=weights)
    assert first.done[0].result_size == (64, 80)
    code = (
        "import sys; from featherweight.cli.main import main; "
        f"code = main(['upscale', {str(source)!r}, '--out', {str(tmp_path / '2.png')!r}, "
        f"'--model', 'dscf_x4', '--weights', {str(weights)!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
