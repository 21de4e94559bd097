"""What the user's device allows: limits on latency, size and MACs, as written on a command line."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.errors import UsageError

_UNITS = {
    "time": {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "us": 1e-6, "µs": 1e-6},
    "size": {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1024.0, "mib": 1024.0**2},
    "count": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
}
_EXAMPLES = {"time": "5ms, 30s or 15m", "size": "800KB or 1MB", "count": "50M or 0.3G"}


def parse_quantity(text: str | float, kind: str) -> float:
    """Read a number with its unit: seconds for `"time"`, bytes for `"size"`, a plain number for `"count"`.

    Args:
        text: for example `"5ms"`, `"1MB"`, `"50M"`; a number passes through unchanged.
        kind: `"time"`, `"size"` (decimal units, and KiB/MiB) or `"count"`.

    Raises:
        UsageError: no such unit, not a number, or not above zero.

    >>> parse_quantity("5ms", "time"), parse_quantity("1MB", "size"), parse_quantity("50M", "count")
    (0.005, 1000000.0, 50000000.0)
    """
    if isinstance(text, int | float):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-zA-Zµ]*)\s*", text)
        unit = match[2].lower() if match else None
        if match is None or unit not in _UNITS[kind]:
            raise UsageError(f"'{text}' is not a {kind}. Write it as {_EXAMPLES[kind]}.")
        value = float(match[1]) * _UNITS[kind][unit]
    if not 0 < value < float("inf"):
        raise UsageError(f"'{text}' must be above zero. Write it as {_EXAMPLES[kind]}.")
    return value


@dataclass(frozen=True)
class Budget:
    """Limits that the shipped model must keep; None means no limit.

    `max_drop` is in percentage points of validation accuracy lost from float32 to int8.
    """

    max_latency_ms: float | None = None
    max_size_bytes: float | None = None
    max_macs: float | None = None
    max_drop: float = 1.0

    @classmethod
    def parse(
        cls,
        max_latency: str | float | None = None,
        max_size: str | float | None = None,
        max_macs: str | float | None = None,
        max_drop: float = 1.0,
    ) -> Budget:
        """Read the limits as a user writes them; a bare number is milliseconds, bytes or MACs.

        Raises:
            UsageError: a limit cannot be read, or `max_drop` is negative.
        """
        if max_drop < 0:
            raise UsageError(f"--max-drop {max_drop} must be zero or more percentage points.")
        if isinstance(max_latency, str):
            max_latency = 1000 * parse_quantity(max_latency, "time")
        return cls(
            max_latency_ms=None if max_latency is None else parse_quantity(max_latency, "time"),
            max_size_bytes=None if max_size is None else parse_quantity(max_size, "size"),
            max_macs=None if max_macs is None else parse_quantity(max_macs, "count"),
            max_drop=max_drop,
        )

    def violations(self, latency_ms: float, size_bytes: float, macs: float) -> list[str]:
        """Return one line for each limit that these figures break; empty when all hold."""
        lines = []
        if self.max_latency_ms is not None and latency_ms > self.max_latency_ms:
            lines.append(f"latency {latency_ms:.3g} ms > {self.max_latency_ms:.3g} ms")
        if self.max_size_bytes is not None and size_bytes > self.max_size_bytes:
            lines.append(f"size {size_bytes / 1e3:,.0f} kB > {self.max_size_bytes / 1e3:,.0f} kB")
        if self.max_macs is not None and macs > self.max_macs:
            lines.append(f"MACs {macs / 1e6:,.2f} M > {self.max_macs / 1e6:,.2f} M")
        return lines

    def excess(self, latency_ms: float, size_bytes: float, macs: float) -> float:
        """Return how far the worst limit is missed as a ratio; 1.0 or less means that all hold."""
        pairs = [
            (latency_ms, self.max_latency_ms),
            (size_bytes, self.max_size_bytes),
            (macs, self.max_macs),
        ]
        return max((seen / limit for seen, limit in pairs if limit is not None), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the limits as plain values for JSON."""
        return asdict(self)
