"""A page of pictures before and after, each under a slider: one HTML file that loads nothing.

The two pictures of a pair lie on one another and a range input moves the border between them, so that the
arrow keys work as well as the mouse; without scripts both are shown whole, one above the other.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from featherweight.files import atomic_write
from featherweight.report.html import environment


@dataclass(frozen=True)
class Pair:
    """One picture before and after.

    Args:
        title: the picture's name.
        caption: figures or remarks, in a sentence.
        before: pixels (H, W, 1 or 3), uint8.
        after: of the same shape.
    """

    title: str
    caption: str
    before: np.ndarray
    after: np.ndarray


def render_before_after(
    title: str, pairs: Sequence[Pair], after: str, before: str = "bicubic", remark: str = ""
) -> str:
    """Return the page.

    Args:
        title: heading.
        pairs: pictures in their order.
        after: what the right side is called.
        before: what the left side is called.
        remark: a paragraph under the heading.
    """
    shown = [
        {
            "title": pair.title,
            "caption": pair.caption,
            "width": pair.after.shape[1],
            "height": pair.after.shape[0],
            "before": png_uri(pair.before),
            "after": png_uri(pair.after),
        }
        for pair in pairs
    ]
    template = environment().get_template("before_after.html.j2")
    return template.render(title=title, pairs=shown, before=before, after=after, remark=remark)


def write_before_after(
    path: str | Path,
    title: str,
    pairs: Sequence[Pair],
    after: str,
    before: str = "bicubic",
    remark: str = "",
) -> Path:
    """Write the page, atomically, and return its path.

    Raises:
        WriteError: the file cannot be written.
    """
    return atomic_write(path, render_before_after(title, pairs, after, before, remark))


def png_uri(pixels: np.ndarray) -> str:
    """Write pixels as a data URI without loss: a comparison must not add a compression of its own."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
