"""The plots of waterline and efficiency gap show the numbers that they are given."""

import pytest

from featherweight.measure.roofline import Kernel, Roofline, Waterline
from featherweight.report.efficiency import GapPoint, frontier, gap_figure, waterline_figure
from featherweight.report.plots import BLUE, ORANGE, figure_svg

MACHINE = Roofline(50e9, 20e9)


def test_bars_are_as_wide_as_macs_and_as_high_as_intensity():
    kernels = (
        Kernel("dense", 10_000_000, 500_000, 500_000),
        Kernel("pool", 0, 400_000, 4),
        Kernel("thin", 1_000_000, 2_000_000, 2_000_000),
    )
    axes = waterline_figure(Waterline(kernels, MACHINE)).axes[0]
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert bars == [(0, 10, 20), (10, 1, 0.5)]
    colours = [bar.get_facecolor() for bar in axes.patches]
    from matplotlib.colors import to_rgba

    assert colours == [to_rgba(BLUE), to_rgba(ORANGE)]
    assert axes.lines[0].get_ydata()[0] == 5 and axes.get_yscale() == "log"
    assert "1 kernels without MACs" in axes.get_title()


def test_gap_joins_ideal_and_measured():
    points = [GapPoint("a", 0.7, 50_000_000, 4.0), GapPoint("b", 0.8, 100_000_000, 2.5)]
    figure = gap_figure(points, MACHINE)
    joins = [line.get_xdata() for line in figure.axes[0].lines[:2]]
    assert joins[0] == pytest.approx([1, 4]) and joins[1] == pytest.approx([2, 2.5])
    assert [text.get_text() for text in figure.axes[0].texts] == ["a, e = 25%", "b, e = 80%"]
    measured = next(line for line in figure.axes[0].lines if line.get_label() == "measured, frontier")
    assert list(measured.get_xdata()) == [2.5]
    assert "<svg" in figure_svg(figure, "efficiency gap", "gap")


def test_frontier_keeps_ties_out():
    assert frontier([(1.0, 50.0), (1.0, 60.0), (2.0, 60.0)]) == [(1.0, 60.0)]
