"""The page of sliders: whole in itself, usable by keyboard, exact pixels, safe texts."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from featherweight.report.before_after import Pair, render_before_after, write_before_after

RNG = np.random.default_rng(0)
BEFORE, AFTER = (RNG.integers(0, 256, (12, 20, 3), np.uint8) for _ in range(2))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))


def tags(page: str, name: str) -> list[dict]:
    parser = Tags()
    parser.feed(page)
    return [attributes for tag, attributes in parser.found if tag == name]


def test_pixels_are_exact_and_nothing_is_loaded() -> None:
    page = render_before_after("Title", [Pair("a.png", "caption", BEFORE, AFTER)], "cfsr_x4")
    sources = [image["src"] for image in tags(page, "img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for source, expected in zip(sources, (BEFORE, AFTER), strict=True):
        raw = base64.b64decode(source.partition(",")[2])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), expected)
    assert not re.search(r"https?://", page) and not tags(page, "link")
    assert "default-src 'none'" in tags(page, "meta")[2]["content"]


def test_every_slider_is_named_and_reached_by_keyboard() -> None:
    pairs = [Pair(f"{k}.png", "", BEFORE, AFTER) for k in range(3)]
    page = render_before_after("Title", pairs, "cfsr_x4")
    sliders = tags(page, "input")
    assert len(sliders) == 3 and len({slider["aria-label"] for slider in sliders}) == 3
    assert all(slider["type"] == "range" and "tabindex" not in slider for slider in sliders)
    assert all(image["alt"] for image in tags(page, "img"))


def test_names_cannot_smuggle_markup() -> None:
    page = render_before_after("<script>1", [Pair('"><script>2', "<b>", BEFORE, AFTER)], "m<i>")
    assert len(tags(page, "script")) == 1 and not tags(page, "b") and not tags(page, "i")


def test_grey_pictures_and_the_file(tmp_path: Path) -> None:
    path = write_before_after(tmp_path / "r.html", "T", [Pair("a", "", BEFORE[..., :1], AFTER[..., :1])], "m")
    assert len(tags(path.read_text(), "img")) == 2
