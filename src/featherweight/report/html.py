"""The report as one HTML file that needs no network: styles, figures and images are all inside it."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from featherweight.files import atomic_write
from featherweight.report import plots, units
from featherweight.report.content import RunReport, sort_candidates
from featherweight.report.tables import interval_text, variant_rows

THUMBNAIL_PX = 256
PNG_UP_TO_PX = 64


def image_uri(image: Image.Image, side_px: int = THUMBNAIL_PX) -> str:
    """Write an image as a data URI, shrunk to `side_px` at most and without any metadata of the photograph.

    Small images stay exact (PNG); larger ones become JPEG.
    """
    image = image.convert("RGB")
    image.thumbnail((side_px, side_px))
    # EXIF and colour profiles ride along in info: a report is sent around, the place of a photograph is not
    image.info.clear()
    kind = "png" if max(image.size) <= PNG_UP_TO_PX else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


@functools.cache
def environment() -> Environment:
    """Return the templates of this folder with the filters that they use."""
    templates = Environment(
        loader=PackageLoader("featherweight.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        bytes=units.format_bytes,
        count=units.format_count,
        ms=units.format_ms,
        percent=units.format_percent,
        seconds=units.format_seconds,
        image_uri=image_uri,
        rows=lambda facts: [(str(key).replace("_", " "), cell_text(value)) for key, value in facts.items()],
    )
    return templates


def cell_text(value: object) -> str:
    """Write any value of a summary for a table cell: counts, lists and nested mappings in plain words.

    >>> cell_text({"train": 1200, "test": 300}), cell_text([8, 8]), cell_text(0.25)
    ('train 1200, test 300', '8, 8', '0.25')
    """
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(cell_text(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: units.MISSING}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(content: RunReport) -> dict[str, Markup]:
    """Draw each figure that the content has data for, as inline SVG by name."""
    drawn: dict[str, tuple[Figure, str]] = {}
    if content.candidates:
        drawn["candidates"] = (
            plots.candidates_figure(content.candidates, content.budget.get("max_latency_ms")),
            f"Accuracy against latency for {len(content.candidates)} candidates",
        )
    if content.variants:
        drawn["bars"] = (plots.bars_figure(content.variants), "Latency and file size of each exported file")
    if content.history:
        drawn["curves"] = (plots.curves_figure(content.history), "Loss, accuracy and learning rate by epoch")
    if content.confusion is not None:
        figure = plots.confusion_figure(content.confusion, content.classes)
        drawn["confusion"] = (figure, f"Confusion matrix of {len(content.classes)} classes")
    # figure_svg escapes every text itself
    return {name: Markup(plots.figure_svg(figure, label, name)) for name, (figure, label) in drawn.items()}


def _confused_pairs(content: RunReport, limit: int = 8) -> list[tuple[str, str, int, int]]:
    """List the commonest mistakes as (true class, predicted class, times, images of the true class)."""
    if content.confusion is None:
        return []
    totals = content.confusion.sum(axis=1)
    pairs = [
        (content.classes[i], content.classes[j], int(content.confusion[i, j]), int(totals[i]))
        for i in range(len(content.classes))
        for j in range(len(content.classes))
        if i != j and content.confusion[i, j] > 0
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]


def _step_rows(steps_s: Mapping[str, float]) -> list[tuple[str, str]]:
    rows = [(name, units.format_seconds(seconds)) for name, seconds in steps_s.items()]
    return [*rows, ("total", units.format_seconds(sum(steps_s.values())))]


def render_report(content: RunReport) -> str:
    """Return the whole report as one HTML page; it loads nothing from anywhere.

    Args:
        content: what to show. Parts without data (no history, no Grad-CAM) leave their section out.
    """
    final = content.final
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=content,
            chosen=content.chosen,
            final=final,
            final_ms=final.single_thread_ms if final else None,
            interval=interval_text(final) if final else "",
            candidates=sort_candidates(content.candidates),
            variant_rows=variant_rows(content.variants),
            budget=units.budget_rows(content.budget),
            steps=_step_rows(content.steps_s),
            pairs=_confused_pairs(content),
            figures=_figures(content),
        )
    )


def write_report(content: RunReport, path: str | Path) -> Path:
    """Write the report to `path`, atomically, and return the path.

    Raises:
        WriteError: the file cannot be written; an older report is left as it was.
    """
    return atomic_write(path, render_report(content))
