"""Which candidates are measured, kept and dropped; exports and stopwatches are replaced by fixed figures."""

import dataclasses

import pytest

from featherweight.errors import BudgetError
from featherweight.workflows import screening
from featherweight.workflows.budget import Budget
from featherweight.workflows.candidates import Candidate
from featherweight.workflows.screening import Screened, screen

# Network -> (multiply-adds and weights at width 1, milliseconds, images per second in training at width 1)
NETWORKS = {"plain": (4_000_000, 0.4, 800.0), "deep": (9_000_000, 0.2, 40.0), "wide": (6_000_000, 0.9, 900.0)}


@pytest.fixture
def figures(monkeypatch):
    """Put fixed figures in place of every measurement; return the labels of what was exported."""
    exported = []

    def count(candidate, num_classes, in_chans, budget):
        macs = int(NETWORKS[candidate.model][0] * candidate.width)
        lines = budget.violations(0.0, macs, macs)
        return Screened(candidate, macs, macs, macs, dropped="; ".join(lines))

    def export(candidate, *args):
        exported.append(candidate.label)
        macs, latency_ms, _ = NETWORKS[candidate.model]
        latency_ms, size = latency_ms * candidate.width, int(macs * candidate.width)
        times = {"float32_latency_ms": 2 * latency_ms, "int8_latency_ms": latency_ms}
        return {"macs": size, "float32_size_bytes": 4 * size, "int8_size_bytes": size, **times}

    def train(entry, *args):
        speed = NETWORKS[entry.candidate.model][2] / entry.candidate.width
        return dataclasses.replace(entry, images_per_s=speed)

    monkeypatch.setattr(screening, "_count", count)
    monkeypatch.setattr(screening, "_cached_figures", export)
    monkeypatch.setattr(screening, "_timed_training", train)
    monkeypatch.setattr(screening, "training_macs_per_s", lambda: 1e12)
    return exported


def run(tmp_path, latency=None, speed=0.0, keep=9, networks=NETWORKS):
    candidates = [Candidate(name, width, 32) for name in networks for width in (0.5, 1.0)]
    budget = Budget.parse(latency, None, None, 1.0)
    found = screen(candidates, 10, 3, budget, keep, tmp_path, min_images_per_s=speed)
    return {entry.candidate.label: entry.dropped for entry in found}


def kept(found):
    return sorted(label for label, dropped in found.items() if not dropped)


def test_without_limits_every_candidate_stays(tmp_path, figures):
    assert len(kept(run(tmp_path))) == 6 == len(figures)


def test_the_most_capable_of_each_network_come_first(tmp_path, figures):
    found = run(tmp_path, keep=2)
    assert figures == ["deep-w1-32px", "wide-w1-32px"]
    assert "the time is for the others" in found["plain-w1-32px"]


def test_a_slowly_learning_network_is_not_even_exported(tmp_path, figures):
    found = run(tmp_path, latency="0.5ms", speed=200)
    assert kept(found) == ["plain-w0.5-32px", "plain-w1-32px", "wide-w0.5-32px"]
    assert "80 images/s" in found["deep-w1-32px"]
    assert not any(label.startswith("deep") for label in figures)


def test_a_slowly_learning_network_stands_in_where_no_other_fits(tmp_path, figures):
    assert kept(run(tmp_path, latency="0.15ms", speed=200)) == ["deep-w0.5-32px"]


def test_the_fastest_stays_where_all_learn_slowly(tmp_path, figures):
    assert kept(run(tmp_path, speed=5_000)) == ["wide-w0.5-32px"]


def test_nothing_fits_names_the_nearest(tmp_path, figures):
    with pytest.raises(BudgetError, match=r"plain-w0\.5-32px, misses it by latency 0\.2 ms > 0\.01 ms"):
        run(tmp_path, latency="0.01ms", networks=("plain", "wide"))
