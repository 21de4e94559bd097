"""Numbers for people: a quantity and its unit as short text, one way everywhere."""

from __future__ import annotations

import math

MISSING = "–"


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def format_count(value: float | None) -> str:
    """Shorten a count to three digits.

    >>> format_count(3_504_872), format_count(950), format_count(None)
    ('3.50 M', '950', '–')
    """
    if _absent(value):
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999 950 would round to "1000 k": hand it to the next unit up
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:g}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def format_bytes(value: float | None) -> str:
    """Write a size in decimal units (1 kB is 1000 bytes), as file managers and budgets do.

    >>> format_bytes(98_304), format_bytes(2_600_000), format_bytes(12)
    ('98.3 kB', '2.60 MB', '12 B')
    """
    if _absent(value):
        return MISSING
    return (
        f"{value:g} B"
        if value < 999.5
        else format_count(value).replace("k", "kB").replace("M", "MB").replace("G", "GB")
    )


def format_ms(value: float | None) -> str:
    """Write a latency in milliseconds with three digits.

    >>> format_ms(0.1234), format_ms(12.34)
    ('0.123 ms', '12.3 ms')
    """
    if _absent(value):
        return MISSING
    return f"{value:.3f} ms" if value < 0.9995 else f"{_three_digits(value)} ms"


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """Write a fraction as a percentage.

    >>> format_percent(0.9912), format_percent(None)
    ('99.1 %', '–')
    """
    return MISSING if _absent(fraction) else f"{100 * fraction:.{digits}f} %"


def format_seconds(value: float | None) -> str:
    """Write a duration.

    >>> format_seconds(0.42), format_seconds(75), format_seconds(7322)
    ('0.4 s', '1 min 15 s', '2 h 02 min')
    """
    if _absent(value):
        return MISSING
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


BUDGET_LIMITS = {
    "max_latency_ms": ("Latency at most", format_ms),
    "max_size_bytes": ("File size at most", format_bytes),
    "max_macs": ("MACs at most", format_count),
    "max_drop": ("Accuracy lost to int8 at most", lambda points: f"{points:.1f} points"),
    "time_s": ("Time to search and train", format_seconds),
}


def budget_rows(budget: dict[str, float | None]) -> list[tuple[str, str]]:
    """Name each limit that was set and write it with its unit.

    >>> budget_rows({"max_latency_ms": 0.5, "max_macs": None})
    [('Latency at most', '0.500 ms')]
    """
    return [
        (name, write(budget[key]))
        for key, (name, write) in BUDGET_LIMITS.items()
        if budget.get(key) is not None
    ]
