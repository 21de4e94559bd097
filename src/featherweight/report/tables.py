"""Terminal tables of a run, as rich objects; printing them is the command line's job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from featherweight.report.content import CandidatePoint, VariantResult, sort_candidates
from featherweight.report.units import MISSING, format_bytes, format_count, format_ms, format_percent


def candidates_table(candidates: Sequence[CandidatePoint]) -> Table:
    """List every candidate with its figures and why it was kept or dropped, the chosen one first."""
    table = Table(title=f"Candidates ({len(candidates)})", title_justify="left", header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    for column in ("network", "width", "input"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "MACs", "size", "latency", "val. acc."):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for place, point in enumerate(sort_candidates(candidates), 1):
        style = "bold green" if point.chosen else "dim" if point.accuracy is None or point.dropped else ""
        cells = (
            str(place),
            ("★ " if point.chosen else "") + point.name,
            f"{point.width:g}",
            f"{point.input} px",
            format_count(point.params),
            format_count(point.macs),
            format_bytes(point.size_bytes),
            format_ms(point.latency_ms),
            format_percent(point.accuracy),
            point.verdict,
        )
        # Text, not str: a verdict in [brackets] is not markup
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def variants_table(variants: Mapping[str, VariantResult]) -> Table:
    """List what was measured of each exported file, one column for each."""
    table = Table(title="Exported files", title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    for name in variants:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for label, cells in variant_rows(variants):
        table.add_row(Text(label), *(Text(cell) for cell in cells))
    return table


def variant_rows(variants: Mapping[str, VariantResult]) -> list[tuple[str, list[str]]]:
    """Write each measured quantity for each variant, as (name, one text for each variant)."""
    shown = list(variants.values())
    rows = [
        ("test accuracy", [format_percent(v.test_accuracy, 2) for v in shown]),
        ("95 % interval", [interval_text(v) for v in shown]),
    ]
    for threads in sorted({int(point["threads"]) for v in shown for point in v.latency_ms}):
        label = f"latency p50 / p95, {threads} thread{'s' if threads > 1 else ''}"
        rows.append((label, [_latency_text(v, threads) for v in shown]))
    if any(v.engine for v in shown):
        rows.append(("compiled p50 / p95, 1 thread", [_engine_text(v, "latency_ms") for v in shown]))
        rows.append(
            ("onnxruntime in turns with it", [_engine_text(v, "onnxruntime_latency_ms") for v in shown])
        )
    return [
        *rows,
        ("file size", [format_bytes(v.size_bytes) for v in shown]),
        ("peak memory", [format_bytes(v.peak_memory_bytes) for v in shown]),
        ("MACs", [format_count(v.macs) for v in shown]),
        ("parameters", [format_count(v.params) for v in shown]),
    ]


def interval_text(variant: VariantResult) -> str:
    """Write the 95 % interval of the test accuracy."""
    low, high = variant.test_accuracy_interval
    return f"{100 * low:.2f} – {100 * high:.2f} %"


def _latency_text(variant: VariantResult, threads: int) -> str:
    for point in variant.latency_ms:
        if point["threads"] == threads:
            return _percentiles_text(point)
    return MISSING


def _engine_text(variant: VariantResult, which: str) -> str:
    return _percentiles_text(variant.engine[which]) if variant.engine else MISSING


def _percentiles_text(point: Mapping[str, float]) -> str:
    return f"{format_ms(point['p50']).removesuffix(' ms')} / {format_ms(point['p95'])}"
