"""The verb `upscale`: exit codes, one line of error, JSON, sizes on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from featherweight.cli.main import main
from featherweight.cli.upscale import parse_bytes
from featherweight.errors import UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "workflows"))
from tiny_restorers import picture, write_restorer


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    Image.fromarray(picture(12, 14)).save(tmp_path / "a.png")
    network = write_restorer(tmp_path / "tiny.onnx")
    return ["upscale", str(tmp_path / "a.png"), "--model", str(network), "--engine", "onnxruntime"]


def test_exit_codes(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    assert "a_x2.png: 28 x 24 pixels" in capsys.readouterr().out
    assert main(words) == 2, "nothing to do"
    assert "Replace them with --overwrite" in capsys.readouterr().err
    (tmp_path / "zero.jpg").write_bytes(b"")
    assert main([*words, str(tmp_path / "zero.jpg"), "--overwrite"]) == 3
    captured = capsys.readouterr()
    assert "a_x2.png" in captured.out and captured.err.count("\n") == 1
    assert "1 of 2 pictures skipped" in captured.err
    assert main([*words, "--scale", "3"]) == 2
    assert main([*words, "--tile", "big"]) == 2
    assert main([*words, "--out", str(tmp_path / "a.png" / "b")]) == 1


def test_json(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*words, "--json", "--tile", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["done"][0]["result_size"] == [24, 28] and found["engines"] == {"onnxruntime": 1}


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture) -> None:
    assert main(["upscale", "--help"]) == 0
    assert "the exit code is 3" in " ".join(capsys.readouterr().out.split())


def test_sizes() -> None:
    assert parse_bytes("1.5G") == 1_500_000_000
    for wrong in ("", "0GB", "many", "-1MB"):
        with pytest.raises(UsageError):
            parse_bytes(wrong)
