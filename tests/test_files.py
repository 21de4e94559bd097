"""Files are replaced as a whole or not at all, and the cache has one place."""

import errno
import json
import os
import stat
from pathlib import Path

import platformdirs
import pytest

from featherweight.errors import FeatherweightError
from featherweight.files import atomic_write, atomic_write_json, cache_folder


def test_file_is_utf8_readable_by_others_and_replaces(tmp_path):
    path = tmp_path / "new" / "日本.html"
    atomic_write(path, "old")
    assert atomic_write(str(path), "ü\n") == path
    assert path.read_bytes() == "ü\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_bytes_empty_content_and_the_longest_name(tmp_path):
    for name, content in (("a", b"\r\n\x00"), ("b", b""), ("日" * 83, b"x")):
        assert atomic_write(tmp_path / name, content).read_bytes() == content


def test_json_round_trip(tmp_path):
    path = atomic_write_json(tmp_path / "a.json", {"name": "ü", "values": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ü", "values": [1, 2.5]}
    assert "ü" in path.read_text(encoding="utf-8")


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, raw: write(handle, raw[:3]))
    assert atomic_write(tmp_path / "a", b"0123456789").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "chmod", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = atomic_write(tmp_path / "report.html", "old")

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(
            FeatherweightError, match=r"report\.html: No space left.*Free some space"
        ) as caught:
            atomic_write(path, "new")
    assert caught.value.exit_code == 1 and isinstance(caught.value, OSError)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_a_disk_that_fills_up_half_way(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a", b"old")
    write, calls = os.write, []

    def fill_up(handle, raw):
        calls.append(len(raw))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, raw[:2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill_up)
        with pytest.raises(FeatherweightError, match="No space"):
            atomic_write(path, b"newer")
    assert calls == [5, 3] and path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_passes_through_and_cleans_up(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a", b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_the_folder_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FeatherweightError, match="Cannot write"):
        atomic_write(tmp_path / "run" / "a", b"x")


def test_the_cache_folder_follows_the_variable_and_the_system(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    assert cache_folder("weights") == tmp_path / "weights"
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", "~/models")
    assert cache_folder("latency") == Path.home() / "models" / "latency"
    monkeypatch.delenv("FEATHERWEIGHT_CACHE")
    system = Path(platformdirs.user_cache_dir("featherweight")) / "datasets"
    assert cache_folder("datasets") == system
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", "")
    assert cache_folder("datasets") == system
