import stat

from featherweight.report.files import write_text_atomic


def test_file_is_utf8_readable_by_others_and_replaces(tmp_path):
    path = tmp_path / "new" / "日本.html"
    write_text_atomic(path, "old")
    assert write_text_atomic(str(path), "ü\n") == path
    assert path.read_bytes() == "ü\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
