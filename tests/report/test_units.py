import pytest

from featherweight.report import units


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999_960, "1.00 M"), (999, "999"), (1000, "1.00 k"), (float("nan"), "–")]
)
def test_counts(value, text):
    assert units.format_count(value) == text


def test_edges_round_into_the_next_unit():
    assert units.format_bytes(999_999) == "1.00 MB"
    assert units.format_ms(0.99999) == "1.00 ms"
    assert units.format_seconds(59.99) == "1 min 00 s"
    assert units.format_percent(None) == units.MISSING
