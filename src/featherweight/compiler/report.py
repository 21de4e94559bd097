"""The report of a compiled network: every layer with its MACs, kernel, time and rate."""

from __future__ import annotations

from typing import Any

from featherweight.compiler.memory import largest_live_bytes
from featherweight.compiler.program import Program


def layer_report(
    program: Program,
    description: dict[str, Any],
    seconds: list[float] | None = None,
    peak: float | None = None,
) -> dict[str, Any]:
    """Return the report as plain data.

    Args:
        program: after lowering.
        description: what the library says about itself.
        seconds: time of each step, None where none was taken.
        peak: float32 multiply-adds a second of one thread; layers of float32 get their share of it.
    """
    layers = []
    for index, step in enumerate(program.steps):
        layer: dict[str, Any] = {"name": step.name, "op": step.op, "kernel": step.kernel, "macs": step.macs}
        layer |= step.facts
        if seconds is not None:
            layer["time_ms"] = seconds[index] * 1e3
            layer["gmacs_per_s"] = step.macs / seconds[index] / 1e9 if seconds[index] else 0.0
            if peak and step.macs and not step.kernel.startswith("8-bit"):
                layer["share_of_peak"] = layer["gmacs_per_s"] * 1e9 / (peak * description["threads"])
        layers.append(layer)
    total = sum(step.macs for step in program.steps)
    report: dict[str, Any] = {
        **description,
        "macs": total,
        "largest_live_bytes": largest_live_bytes(program),
        "layers": layers,
    }
    if seconds is not None:
        report["time_ms"] = sum(seconds) * 1e3
        report["peak_gmacs_per_s"] = (peak or 0.0) / 1e9
    return report
