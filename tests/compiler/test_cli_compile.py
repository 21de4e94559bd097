"""`featherweight compile`: files, report, check and exit codes."""

import json

import pytest
from onnx_files import save, tiny_convnet

from featherweight.cli.main import main


@pytest.fixture
def path(tmp_path):
    return save(tiny_convnet(), tmp_path / "net.onnx")


def test_compile_writes_checks_and_reports(path, tmp_path, capsys):
    words = ["compile", str(path), "--out", str(tmp_path / "out"), "--check", "--batch", "2", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["inputs"][0]["shape"] == [2, 3, 17, 15]
    assert report["max_relative_error"] < 1e-5
    assert report["layers"][1]["time_ms"] > 0


def test_the_table_names_every_layer(path, tmp_path, capsys):
    assert main(["compile", str(path), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "stem" in shown and "depthwise 3x3" in shown and "MB arena" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--shape", "image=1,3,9"], 3, "does not fit"),
        (["--shape", "image"], 2, "expected NAME="),
        (["--shape", "picture=1,3,17,15"], 3, "No input is called picture"),
        (["--target", "z80"], 3, "No target"),
        (["--threads", "0"], 2, "threads=0"),
    ],
)
def test_wrong_words_end_in_one_line(words, code, message, path, tmp_path, capsys):
    assert main(["compile", str(path), "--out", str(tmp_path / "out"), *words]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tuned_tiles_are_kept(path, tmp_path, capsys):
    for folder in ("a", "b"):
        assert main(["compile", str(path), "--out", str(tmp_path / folder), "--tune", "--check"]) == 0
    capsys.readouterr()
    assert (tmp_path / "a/model.c").read_text() == (tmp_path / "b/model.c").read_text()
