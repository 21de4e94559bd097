import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.collections import PatchCollection

from featherweight.report import plots


def _points(axes):
    return sum(len(group.get_offsets()) for group in axes.collections)


def test_every_candidate_is_one_point(make_run):
    figure = plots.candidates_figure(make_run().candidates, max_latency_ms=0.5)
    main, strip = figure.axes
    assert _points(main) == 4
    assert _points(strip) == 2
    hollow = [g for g in main.collections if g.get_label() == "dropped"]
    assert len(hollow) == 1 and len(hollow[0].get_facecolor()) == 0
    budget = [line for line in main.lines if line.get_label() == "_budget"]
    assert budget[0].get_xdata()[0] == 0.5


def test_pareto_front_holds_the_undominated(make_run):
    candidates = make_run().candidates
    assert [p.name for p in plots.pareto_front(candidates)] == ["net0", "net1", "net3"]
    front = next(
        line
        for line in plots.candidates_figure(candidates).axes[0].lines
        if line.get_label() == "Pareto front"
    )
    assert len(front.get_xdata()) == 3


def test_candidates_all_untrained_still_draw(make_run):
    untrained = [point for point in make_run().candidates if point.accuracy is None]
    figure = plots.candidates_figure(untrained, 0.1)
    assert _points(figure.axes[1]) == 2
    assert "<svg" in plots.figure_svg(figure, "x", "x")


def test_wide_latency_range_is_logarithmic(make_run):
    from dataclasses import replace

    candidates = [*make_run().candidates, replace(make_run().candidates[0], latency_ms=50.0)]
    assert plots.candidates_figure(candidates).axes[-1].get_xscale() == "log"


@pytest.mark.parametrize("epochs", [1, 5])
def test_curves_have_a_point_for_each_epoch(make_run, epochs):
    history = [*make_run().history[: epochs - 1], {"epoch": epochs, "train_loss": 0.1, "val_accuracy": None}]
    figure = plots.curves_figure(history)
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [epochs] * 3


@pytest.mark.parametrize("count", [2, 10, 43, 150])
def test_confusion_draws_each_non_empty_cell(make_run, count):
    run = make_run(count)
    axes = plots.confusion_figure(run.confusion, run.classes).axes[0]
    (cells,) = (item for item in axes.collections if isinstance(item, PatchCollection))
    assert len(cells.get_paths()) == np.count_nonzero(run.confusion)
    named = {2: 2, 10: 10, 43: 43, 150: 50}[count]
    assert len(axes.get_yticks()) == named


def test_bars_have_one_for_each_variant_and_thread_count(make_run):
    left, right = plots.bars_figure(make_run().variants).axes
    assert sorted(bar.get_width() for bar in left.patches) == [0.15, 0.15, 0.2, 0.2]
    assert [bar.get_width() for bar in right.patches] == [80, 30]


def test_svg_is_well_formed_themed_and_has_unique_ids(make_run):
    run = make_run()
    one = plots.figure_svg(plots.confusion_figure(run.confusion, run.classes), 'a "label" <b>', "one")
    two = plots.figure_svg(plots.bars_figure(run.variants), "bars", "two")
    root = ElementTree.fromstring(one)
    assert root.attrib["aria-label"] == 'a "label" <b>'
    assert plots.INK not in one and "currentColor" in one
    assert "<style" not in one and "<metadata" not in one and "<script" not in one
    ids = re.findall(r'\bid="([^"]+)"', one + two)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', one + two))
    assert {a or b for a, b in used} <= set(ids)


def test_svg_is_the_same_each_time(make_run):
    history = make_run().history
    drawn = {plots.figure_svg(plots.curves_figure(history), "x", "x") for _ in range(2)}
    assert len(drawn) == 1
