"""Two plots of computational efficiency: a network's waterline, and the efficiency gap between networks.

How the paper draws them is not known to us; these rules are ours. Waterline: one bar for each kernel, as wide
as its MACs and as high as its intensity, above or below the machine's balance. Gap: for each network its
ideal and its measured latency at its accuracy; on the logarithmic axis their distance is the log of one over
the efficiency.

Reference: Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featherweight.measure.roofline import Roofline, Waterline
from featherweight.report.plots import BLUE, GREEN, INK, ORANGE, RED, STYLE
from featherweight.report.units import format_ms


@dataclass(frozen=True)
class GapPoint:
    """One network: its accuracy (0 to 1), MACs and measured latency on the machine of the roofline."""

    name: str
    accuracy: float
    macs: int
    latency_ms: float


def waterline_figure(waterline: Waterline) -> Figure:
    """Draw one bar for each kernel with MACs, in the order of execution.

    The title gives the ideal and the attainable time; the latter includes the kernels without MACs.
    """
    balance = waterline.roofline.balance
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.4), layout="constrained", facecolor="none")
        axes = figure.subplots()
        left = 0.0
        for kernel in waterline.kernels:
            if kernel.macs:
                width = kernel.macs / 1e6
                colour = BLUE if kernel.intensity >= balance else ORANGE
                axes.bar(left, kernel.intensity, width, align="edge", color=colour, edgecolor=INK, lw=0.4)
                left += width
        axes.axhline(balance, color=RED, linestyle="--", linewidth=1.1)
        label = f"balance of the machine: {balance:.1f}"
        axes.annotate(
            label, (0.99, balance), (0, 3), _RIGHT, textcoords="offset points", ha="right", color=RED
        )
        axes.set_yscale("log")
        axes.set_xlim(0, left)
        axes.set_xlabel("MACs, kernel after kernel (M)")
        axes.set_ylabel("intensity (operations/byte)")
        ideal, attainable = (format_ms(1e3 * time) for time in (waterline.ideal_s, waterline.attainable_s))
        without = sum(not kernel.macs for kernel in waterline.kernels)
        title = f"ideal {ideal}, attainable {attainable} (efficiency {waterline.efficiency:.0%})"
        axes.set_title(f"{title}; {without} kernels without MACs not drawn", fontsize=8)
    return figure


def gap_figure(points: Sequence[GapPoint], roofline: Roofline) -> Figure:
    """Draw ideal (hollow) and measured (filled) latency of each network, and the frontier of either."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 4.0), layout="constrained", facecolor="none")
        axes = figure.subplots()
        ideal = [(1e3 * roofline.ideal_s(point.macs), 100 * point.accuracy) for point in points]
        measured = [(point.latency_ms, 100 * point.accuracy) for point in points]
        for point, start, end in zip(points, ideal, measured, strict=True):
            axes.plot([start[0], end[0]], [start[1], end[1]], color=INK, alpha=0.35, linewidth=0.8)
            e = roofline.efficiency(point.macs, point.latency_ms / 1e3)
            axes.annotate(f"{point.name}, e = {e:.0%}", end, (5, 3), textcoords="offset points", fontsize=7)
        _plot_side(axes, ideal, "ideal", GREEN, is_filled=False)
        _plot_side(axes, measured, "measured", BLUE, is_filled=True)
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.12)
        axes.set_xlabel("latency (ms)")
        axes.set_ylabel("accuracy (%)")
        axes.grid(True)
        axes.legend(loc="lower right")
    return figure


_RIGHT = ("axes fraction", "data")


def _plot_side(
    axes: Axes, places: list[tuple[float, float]], label: str, colour: str, is_filled: bool
) -> None:
    axes.plot(*zip(*frontier(places), strict=True), color=colour, linewidth=1.4, label=f"{label}, frontier")
    axes.scatter(
        *zip(*places, strict=True),
        s=30,
        facecolors=colour if is_filled else "none",
        edgecolors=colour,
        zorder=3,
        label=label,
    )


def frontier(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (latency, accuracy) pairs that no other beats in both, fastest first.

    >>> frontier([(2.0, 70.0), (1.0, 60.0), (3.0, 65.0)])
    [(1.0, 60.0), (2.0, 70.0)]
    """
    best: list[tuple[float, float]] = []
    for latency, accuracy in sorted(places, key=lambda place: (place[0], -place[1])):
        if not best or accuracy > best[-1][1]:
            best.append((latency, accuracy))
    return best
