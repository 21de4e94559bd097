"""Budgets: how they are written, and when they are broken."""

import pytest

from featherweight.errors import UsageError
from featherweight.workflows.budget import Budget, parse_quantity


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5ms", "time", 0.005),
        ("250us", "time", 250e-6),
        ("30", "count", 30.0),
        ("15m", "time", 900.0),
        ("1.5h", "time", 5400.0),
        ("0.8MB", "size", 800_000.0),
        ("100 KB", "size", 100_000.0),
        ("1MiB", "size", 1_048_576.0),
        ("50M", "count", 50e6),
        (12, "size", 12.0),
    ],
)
def test_quantities_read_their_units(text, kind, value):
    assert parse_quantity(text, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("5", "time"),
        ("five ms", "time"),
        ("5 MB", "time"),
        ("-1MB", "size"),
        ("0", "count"),
        ("", "size"),
        (0, "size"),
    ],
)
def test_a_quantity_that_cannot_be_meant_is_a_usage_error(text, kind):
    with pytest.raises(UsageError):
        parse_quantity(text, kind)


def test_latency_is_milliseconds_as_a_number_and_any_unit_as_text():
    assert Budget.parse(max_latency="0.5ms") == Budget.parse(max_latency=0.5) == Budget(max_latency_ms=0.5)


def test_negative_drop_is_refused():
    with pytest.raises(UsageError, match="max-drop"):
        Budget.parse(max_drop=-0.1)


def test_violations_name_each_broken_limit_and_nothing_else():
    budget = Budget(max_latency_ms=1.0, max_size_bytes=1000, max_macs=1e6)
    assert budget.violations(1.0, 1000, 1e6) == []
    lines = budget.violations(2.0, 500, 3e6)
    assert [line.split()[0] for line in lines] == ["latency", "MACs"]
    assert Budget().violations(1e9, 1e12, 1e15) == []


def test_excess_is_the_worst_ratio():
    assert Budget(max_latency_ms=1.0, max_macs=10).excess(3.0, 7, 20) == 3.0
    assert Budget().excess(3.0, 7, 20) == 0.0
