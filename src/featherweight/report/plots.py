"""The report's figures: matplotlib without pyplot's global state, written as inline SVG.

Text and axes take the page's own colour (`currentColor`), backgrounds stay transparent, and the series use
Okabe and Ito's colour-blind safe palette, so one file reads well on a light page, on a dark one and on paper.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from featherweight.report.content import CandidatePoint, VariantResult, sort_candidates
from featherweight.report.units import format_bytes, format_ms

# A stand-in for the page's text colour: replaced by currentColor in the SVG
INK = "#010203"
BLUE, ORANGE, GREEN, RED = "#2f86c9", "#e69f00", "#009e73", "#d55e00"
SERIES = (BLUE, GREEN, ORANGE, RED)
STYLE = {
    "svg.fonttype": "none",  # the browser's fonts: any script in a class name, and text that can be searched
    "svg.hashsalt": "featherweight",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a class name may hold dollar signs
    "text.color": INK,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
ANNOTATE_ALL_UP_TO = 16
MAX_TICK_LABELS = 60
MAX_NAME = 24


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # glyphs that matplotlib's own font lacks are drawn by the browser
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _new_figure(width_in: float, height_in: float) -> Figure:
    return Figure(figsize=(width_in, height_in), layout="constrained", facecolor="none")


def pareto_front(candidates: Sequence[CandidatePoint]) -> list[CandidatePoint]:
    """Return the trained candidates that no other beats in both latency and accuracy, fastest first."""
    front: list[CandidatePoint] = []
    trained = [point for point in candidates if point.accuracy is not None]
    for point in sorted(trained, key=lambda p: (p.latency_ms, -p.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def candidates_figure(candidates: Sequence[CandidatePoint], max_latency_ms: float | None = None) -> Figure:
    """Plot accuracy against latency for every candidate.

    Filled: stayed to the end of the search. Hollow: dropped. Strip underneath: never trained; one
    never timed is left out. The line joins the Pareto front, the star is the chosen one, the dashed line the
    latency budget; numbers are places in the sorted table.
    """
    trained = [point for point in candidates if point.accuracy is not None]
    untrained = [p for p in candidates if p.accuracy is None and np.isfinite(p.latency_ms)]
    with _style():
        figure = _new_figure(6.6, 4.3)
        if untrained:
            axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
            axes.tick_params(labelbottom=False)
            _plot_strip(strip, untrained)
            bottom = strip
        else:
            axes = bottom = figure.subplots()
        _plot_trained(axes, trained)
        _number_points(axes, candidates)
        if max_latency_ms is not None:
            for each in {axes, bottom}:
                each.axvline(max_latency_ms, color=RED, linestyle="--", linewidth=1.1, label="_budget")
            axes.plot(
                [], [], color=RED, linestyle="--", linewidth=1.1, label=f"budget {format_ms(max_latency_ms)}"
            )
        _scale_latency(
            bottom, [p.latency_ms for p in trained + untrained] + [max_latency_ms or candidates[0].latency_ms]
        )
        bottom.set_xlabel("latency, median, 1 image, 1 thread (ms)")
        axes.set_ylabel("validation accuracy in the search (%)")
        axes.grid(True)
        figure.legend(loc="outside upper left", ncols=6, handletextpad=0.4, columnspacing=1.2)
    return figure


def _plot_trained(axes: Axes, trained: Sequence[CandidatePoint]) -> None:
    front = pareto_front(trained)
    if len(front) > 1:
        x, y = [p.latency_ms for p in front], [100 * p.accuracy for p in front]
        axes.plot(x, y, color=GREEN, linewidth=1.4, zorder=1, label="Pareto front")
    groups = (
        ("kept", [p for p in trained if not p.dropped and not p.chosen], {"c": BLUE, "s": 34, "marker": "o"}),
        (
            "dropped",
            [p for p in trained if p.dropped and not p.chosen],
            {"facecolors": "none", "edgecolors": BLUE, "s": 34, "linewidths": 1.2},
        ),
        (
            "chosen",
            [p for p in trained if p.chosen],
            {"c": ORANGE, "s": 150, "marker": "*", "edgecolors": INK, "linewidths": 0.6},
        ),
    )
    for label, points, look in groups:
        if points:
            axes.scatter(
                [p.latency_ms for p in points],
                [100 * p.accuracy for p in points],
                label=label,
                zorder=3,
                **look,
            )


def _plot_strip(strip: Axes, untrained: Sequence[CandidatePoint]) -> None:
    # spread in rows, or near-equal latencies would hide one another
    rows = [index % 3 for index in range(len(untrained))]
    strip.scatter(
        [p.latency_ms for p in untrained],
        rows,
        facecolors="none",
        edgecolors=INK,
        alpha=0.6,
        s=20,
        label="never trained",
    )
    strip.set_ylim(-0.8, 2.8)
    strip.set_yticks([])
    strip.set_ylabel("not\ntrained", rotation=0, ha="right", va="center", fontsize=8)


def _number_points(axes: Axes, candidates: Sequence[CandidatePoint]) -> None:
    """Write each trained point's place in the sorted table beside it, and the chosen one's name."""
    for place, point in enumerate(sort_candidates(candidates), 1):
        if point.accuracy is not None:
            text = f"{place}  {point.label}" if point.chosen else f"{place}"
            axes.annotate(
                text,
                (point.latency_ms, 100 * point.accuracy),
                xytext=(0, -9) if point.chosen else (4, 4),
                textcoords="offset points",
                ha="center" if point.chosen else "left",
                va="top" if point.chosen else "bottom",
                fontsize=8 if point.chosen else 7,
                fontweight="bold" if point.chosen else "normal",
            )
    axes.margins(x=0.12, y=0.15)


def _scale_latency(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if low > 0 and high / low > 5:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def curves_figure(history: Sequence[Mapping[str, float | None]]) -> Figure:
    """Plot training loss, validation accuracy and learning rate against the epoch, one above the other."""
    rows = (
        ("train_loss", "training loss", 1, RED),
        ("val_accuracy", "validation\naccuracy (%)", 100, BLUE),
        ("lr", "learning rate", 1, GREEN),
    )
    epochs = [row["epoch"] for row in history]
    with _style():
        figure = _new_figure(6.6, 4.6)
        grid = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 1])
        for axes, (key, label, scale, colour) in zip(grid, rows, strict=True):
            values = [row.get(key) for row in history]
            scaled = [np.nan if value is None else scale * value for value in values]
            # one epoch has no line to show
            axes.plot(
                epochs,
                scaled,
                color=colour,
                linewidth=1.6,
                marker="o" if len(history) < 12 else "",
                markersize=3.5,
            )
            axes.set_ylabel(label)
            axes.grid(True)
        figure.align_ylabels(grid)
        _mark_best(grid[1], epochs, [row.get("val_accuracy") for row in history])
        grid[2].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[2].set_xlabel("epoch")
    return figure


def _mark_best(axes: Axes, epochs: Sequence[float], accuracy: Sequence[float | None]) -> None:
    known = [(value, epoch) for value, epoch in zip(accuracy, epochs, strict=True) if value is not None]
    if known:
        value, epoch = max(known, key=lambda pair: pair[0])
        axes.axhline(100 * value, color=INK, alpha=0.35, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"best {100 * value:.1f} %, epoch {epoch:g}",
            (0.99, 0.06),
            xycoords="axes fraction",
            ha="right",
            fontsize=8,
        )


def shorten(name: str, limit: int = MAX_NAME) -> str:
    """Cut a long name in its middle, on one line.

    >>> shorten("a" * 20 + "b" * 20, 9)
    'aaaa…bbbb'
    """
    name = " ".join(name.split())
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[: limit - 1 - half]}…{name[-half:]}"


def confusion_figure(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix, coloured by share of the true class; empty cells are left out.

    Up to 16 classes every count is written; beyond that only the mistakes, which are what one looks for.
    """
    count = len(classes)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cell_in = 0.46 if count <= ANNOTATE_ALL_UP_TO else 0.21 if count <= MAX_TICK_LABELS else 9 / count
    names = [shorten(name) for name in classes]
    label_in = 0.075 * max(map(len, names)) + 0.6
    side_in = max(2.2, cell_in * count)
    with _style():
        figure = _new_figure(side_in + label_in, side_in + label_in)
        axes = figure.subplots()
        rows, columns = np.nonzero(matrix)
        cells = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j in zip(rows, columns, strict=True)]
        colours = [_cell_colour(i == j, share[i, j]) for i, j in zip(rows, columns, strict=True)]
        axes.add_collection(
            PatchCollection(cells, facecolors=colours, edgecolors="none", rasterized=len(cells) > 4000)
        )
        if count <= MAX_TICK_LABELS:
            _write_counts(axes, matrix, share, small=count > ANNOTATE_ALL_UP_TO)
        _name_axes(axes, names)
    return figure


def _cell_colour(right: bool, share: float) -> tuple[float, float, float, float]:
    # opacity carries the value: an empty cell shows the page, and a lone mistake can still be seen
    red, green, blue = matplotlib.colors.to_rgb(BLUE if right else RED)
    return red, green, blue, 0.18 + 0.82 * float(share)


def _write_counts(axes: Axes, matrix: np.ndarray, share: np.ndarray, small: bool) -> None:
    for i, j in zip(*np.nonzero(matrix), strict=True):
        if i == j and small:
            continue
        colour = "white" if share[i, j] > 0.45 else INK
        text = f"{matrix[i, j]:d}"
        size = (6 if len(text) < 3 else 4.5) if small else (9 if len(text) < 5 else 7)
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)


def _name_axes(axes: Axes, names: Sequence[str]) -> None:
    count = len(names)
    small = count > ANNOTATE_ALL_UP_TO
    step = -(-count // MAX_TICK_LABELS)
    ticks = list(range(0, count, step))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([names[i] for i in ticks]))
        axis.set_minor_locator(FixedLocator([i - 0.5 for i in range(count + 1)] if step == 1 else []))
        axis.set_tick_params(which="minor", length=0)
        axis.set_tick_params(which="major", length=0, labelsize=7 if small else 9)
    upright = max(map(len, names)) > 4
    axes.set_xticks(ticks, labels=[names[i] for i in ticks], rotation=90 if upright else 0)
    axes.grid(True, which="minor")
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(True)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def bars_figure(variants: Mapping[str, VariantResult]) -> Figure:
    """Draw latency (median, whisker to the 95th percentile) for each number of threads, and file size."""
    names = list(variants)
    threads = sorted({int(point["threads"]) for v in variants.values() for point in v.latency_ms})
    with _style():
        figure = _new_figure(6.6, 1.2 + 0.32 * len(names) * max(2, len(threads)))
        left, right = figure.subplots(1, 2)
        height = 0.8 / max(1, len(threads))
        for row, name in enumerate(names):
            for point in variants[name].latency_ms:
                slot = threads.index(int(point["threads"]))
                y = row + (slot - (len(threads) - 1) / 2) * height
                _bar(left, y, point, 0.86 * height, SERIES[slot % 4])
        legend = [
            Patch(color=SERIES[slot % 4], label=f"{number} thread{'s' if number > 1 else ''}")
            for slot, number in enumerate(threads)
        ]
        for row, name in enumerate(names):
            size_bytes = variants[name].size_bytes
            right.barh([row], [size_bytes / 1000], height=0.55, color=BLUE)
            right.annotate(format_bytes(size_bytes), (size_bytes / 1000, row), (4, 0), **_BESIDE)
        left.set_xlabel("latency, 1 image: p50, whisker to p95 (ms)")
        right.set_xlabel("file size (kB)")
        for axes in (left, right):
            axes.set_yticks(range(len(names)), labels=names)
            axes.invert_yaxis()
            axes.margins(x=0.25)
            axes.set_xlim(left=0)
            axes.grid(True, axis="x")
        figure.legend(loc="outside upper left", handles=legend, ncols=len(threads) or 1)
    return figure


_BESIDE = {"textcoords": "offset points", "va": "center", "fontsize": 8}


def _bar(axes: Axes, y: float, point: Mapping[str, float], height: float, colour: str) -> None:
    axes.barh([y], [point["p50"]], height=height, color=colour)
    axes.plot(
        [point["p50"], point["p95"]],
        [y, y],
        color=INK,
        linewidth=1.1,
        marker="|",
        markevery=[1],
        markersize=6,
    )
    axes.annotate(format_ms(point["p50"]), (max(point["p95"], point["p50"]), y), (5, 0), **_BESIDE)


def figure_svg(figure: Figure, label: str, prefix: str) -> str:
    """Write a figure as one `<svg>` element to stand inside a page.

    Args:
        figure: a figure from this module.
        label: what the picture shows, for readers who do not see it.
        prefix: put before every id, so that several figures in one page do not collide.
    """
    buffer = io.StringIO()
    with _style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # a style element would act on the whole page; the template has these two rules
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # only inside tags: a class name may spell out an attribute
    svg = re.sub(r"<[^>]*>", lambda tag: _adapt_tag(tag[0], prefix), svg)
    return re.sub(r"<svg [^>]*>", lambda tag: _opening_tag(tag[0], label), svg, count=1)


def _adapt_tag(tag: str, prefix: str) -> str:
    tag = tag.replace(INK, "currentColor").replace("xlink:href", "href")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", tag)


def _opening_tag(tag: str, label: str) -> str:
    from markupsafe import escape

    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', tag)
    width = round(float(box[1]) * 4 / 3)
    return (
        f'<svg viewBox="0 0 {box[1]} {box[2]}" role="img" aria-label="{escape(label)}" '
        f'style="width:{width}px" xmlns="http://www.w3.org/2000/svg">'
    )
