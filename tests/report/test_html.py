import base64
import io
import os
from html.parser import HTMLParser

import pytest
from PIL import Image

from featherweight.report.html import image_uri, render_report, write_report

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "br", "img", "input", "hr", "link"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Collects tags, loading attributes and text, and checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.words, self.open, self.rows = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADING]
        self.rows += [value for name, value in attrs if name == "class" and tag == "tr"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADING]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_loads_nothing_and_nests(make_run):
    page = Page(render_report(make_run()))
    assert page.open == []
    assert page.loads and all(value.startswith(("data:image/", "#")) for value in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    styles = render_report(make_run())
    assert "@import" not in styles and "url(http" not in styles


@pytest.mark.parametrize("count", [2, 43])
def test_all_classes_and_candidates_are_in_it(make_run, count):
    run = make_run(count)
    page = Page(render_report(run))
    assert sum("candidate" in (row or "") for row in page.rows) == len(run.candidates)
    assert page.rows.count("class") == count
    text = "\n".join(page.words)
    for name in [*run.classes, *(point.name for point in run.candidates), run.command, *run.warnings]:
        assert name in text


def test_hostile_names_stay_text(make_run):
    run = make_run(title=HOSTILE, command=HOSTILE, warnings=[HOSTILE], dataset={HOSTILE: HOSTILE})
    text = render_report(run)
    assert "<script" not in text.lower()
    assert "&lt;script&gt;" in text


def test_bare_run_leaves_sections_out(make_run):
    run = make_run(
        variants={}, candidates=(), history=(), confusion=None, mistakes=(), gradcams=(), steps_s={}, notes=()
    )
    page = Page(render_report(run))
    assert page.tags.count("section") == 2
    assert "svg" not in page.tags


def test_image_uri_drops_metadata_and_shrinks():
    exif = Image.Exif()
    exif[0x010E] = "secret place"
    stored = io.BytesIO()
    Image.new("RGB", (800, 400)).save(stored, "jpeg", exif=exif)
    kind, data = image_uri(Image.open(stored), 256).split(",")
    raw = base64.b64decode(data)
    assert kind == "data:image/jpeg;base64" and b"secret" not in raw
    assert Image.open(io.BytesIO(raw)).size == (256, 128)


def test_small_images_stay_exact():
    picture = Image.effect_noise((8, 8), 90)
    raw = base64.b64decode(image_uri(picture).split(",")[1])
    assert Image.open(io.BytesIO(raw)).convert("L").tobytes() == picture.tobytes()


def test_write_is_atomic(make_run, tmp_path, monkeypatch):
    path = write_report(make_run(), tmp_path / "run" / "report.html")
    before = path.read_bytes()

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(make_run(title="other"), path)
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
