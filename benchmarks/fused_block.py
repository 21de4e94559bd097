"""Time ConvFirst and MBConv blocks on a GPU: one Triton kernel against PyTorch's layers, and compiled ones.

All forms run in turns on the same map in bfloat16, channels last. A row is the median of up to `--runs` turns
with its 95 % interval; "x" is how many times as fast as the layers one after another.

    python benchmarks/fused_block.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from featherweight.errors import UsageError
from featherweight.models.convfirst import ConvFirst, MBConv
from side_by_side import cells, in_turns, provenance, store

SHAPES = ((1, 64, 64), (1, 64, 112), (8, 64, 112), (8, 128, 56), (64, 128, 28))
"""Batch, channels, side in pixels."""

KEY = ("device", "block", "shape", "method")
COLUMNS = (
    *KEY,
    *("p50_ms", "low_ms", "high_ms", "clock", "runs", "times_as_fast", "date", "machine", "versions"),
)


def jobs(kind: type, shape: tuple[int, int, int]) -> dict[str, Callable[[], Any]]:
    """Return the forms of one block on one map, each waiting for the GPU."""
    from featherweight.blocks.fused_block_triton import run_conv_first, run_mbconv

    batch, channels, side = shape
    block = kind(channels, channels).eval()
    block.fuse()
    block = block.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    kernel, compiled = (run_conv_first if kind is ConvFirst else run_mbconv), torch.compile(block)

    def timed(run: Callable[[], Any]) -> Callable[[], None]:
        def job() -> None:
            with torch.no_grad():
                run()
            torch.cuda.synchronize()

        return job

    forms = {"layers": lambda: block(x), "compiled": lambda: compiled(x), "kernel": lambda: kernel(block, x)}
    return {name: timed(run) for name, run in forms.items()}


def main(
    runs: Annotated[int, typer.Option(help="turns per shape")] = 100,
    seconds: Annotated[float, typer.Option(help="time for one shape; five turns at least")] = 30.0,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results/fused_block"),
) -> None:
    """Print one table of medians in milliseconds and store its rows."""
    if not torch.cuda.is_available():
        raise UsageError("There is no GPU here; this benchmark times GPU kernels only.")
    shared = {"device": "cuda", "clock": "wall", **provenance(processor=torch.cuda.get_device_name())}
    rows = []
    for kind in (ConvFirst, MBConv):
        for shape in SHAPES:
            found = in_turns(jobs(kind, shape), runs, 1, seconds, "wall")
            for method, latency in found.items():
                times = {**cells(latency), "times_as_fast": f"{found['layers'].p50_ms / latency.p50_ms:.2f}"}
                named = {"block": kind.__name__, "shape": "x".join(map(str, shape)), "method": method}
                rows.append({**shared, **named, **times})
    path = store(out, rows, KEY, COLUMNS)
    table = Table(title="fused blocks, bfloat16, medians")
    for heading in ("block", "B x C x side", "method", "ms", "x"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*(row[key] for key in ("block", "shape", "method", "p50_ms", "times_as_fast")))
    console = Console()
    console.print(table)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
