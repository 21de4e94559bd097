"""Time the forms of the selective scan against each other: the loop over tokens, chunks, and on a GPU the
kernel.

All forms run in turns on the same tensors, so that a change of the processor's clock hits all alike. A row is
the median of up to `--runs` turns with its 95 % interval; "x" is how many times as fast as the loop.

    python benchmarks/selective_scan.py --threads 1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from featherweight.blocks.selective_scan import selective_scan
from side_by_side import cells, in_turns, provenance, store

SHAPES = ((1, 144, 224, 1), (1, 1024, 320, 1), (1, 3136, 96, 1), (1, 3136, 320, 1), (4, 3136, 96, 1))
"""Batch, length, channels, states: MobileMamba's first stage in T2 and in B4, then 56 x 56 tokens."""

KEY = ("device", "threads", "pass", "shape", "method")
COLUMNS = (
    *KEY,
    *("p50_ms", "low_ms", "high_ms", "clock", "runs", "times_as_fast", "date", "machine", "versions"),
)


def tensors(batch: int, length: int, channels: int, states: int, device: str) -> list[torch.Tensor]:
    """Draw inputs of the sizes that a trained scan sees, with gradients wanted."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, channels, generator=generator)
    delta = F.softplus(torch.randn(batch, length, channels, generator=generator))
    a = -torch.rand(channels, states, generator=generator) - 0.1
    b, c = (torch.randn(batch, length, states, generator=generator) for _ in range(2))
    return [x.to(device).requires_grad_() for x in (u, delta, a, b, c, torch.ones(channels))]


def step(method: str, given: list[torch.Tensor], train: bool) -> None:
    """Run the scan once, with its backward pass if asked."""
    with torch.set_grad_enabled(train):
        y = selective_scan(*given, method=method)
    if train:
        torch.autograd.grad(y.sum(), given)
    if y.is_cuda:
        torch.cuda.synchronize()


def measure(
    shapes: Sequence[tuple[int, int, int, int]],
    threads: int,
    runs: int,
    seconds: float,
    device: str,
    clock: str,
) -> list[dict[str, Any]]:
    """Time all forms on every shape (batch, length, channels, states); one row for each."""
    torch.set_num_threads(threads)
    methods = ["sequential", "chunked", *(["triton"] if device == "cuda" else [])]
    processor = torch.cuda.get_device_name() if device == "cuda" else ""
    shared = {"device": device, "threads": threads, "clock": clock, **provenance(processor=processor)}
    rows = []
    for shape in shapes:
        given = tensors(*shape, device)
        for train in (False, True):
            jobs = {m: lambda m=m: step(m, given, train) for m in methods}  # noqa: B023
            found = in_turns(jobs, runs, threads, seconds, clock)
            for method, latency in found.items():
                ratio = found["sequential"].p50_ms / latency.p50_ms
                named = {"pass": "train" if train else "forward", "shape": "x".join(map(str, shape))}
                times = {**cells(latency), "times_as_fast": f"{ratio:.1f}"}
                rows.append({**shared, **named, "method": method, **times})
    return rows


def main(
    threads: Annotated[int, typer.Option(help="threads of PyTorch")] = 1,
    runs: Annotated[int, typer.Option(help="turns per shape")] = 50,
    seconds: Annotated[float, typer.Option(help="time for one shape and pass; five turns at least")] = 60.0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    clock: Annotated[str, typer.Option(help="wall, or cpu: for one thread on a busy machine")] = "wall",
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results/selective_scan"),
) -> None:
    """Print one table of medians in milliseconds and store its rows."""
    rows = measure(SHAPES, threads, runs, seconds, device, clock)
    path = store(out, rows, KEY, COLUMNS)
    table = Table(title=f"selective scan, float32, {device}, {threads} thread(s), medians")
    for heading in ("B x L x D x N", "pass", "method", "ms", "95 % interval", "x"):
        table.add_column(heading)
    for row in rows:
        interval = f"{row['low_ms']} - {row['high_ms']}"
        table.add_row(
            *(row[key] for key in ("shape", "pass", "method", "p50_ms")), interval, row["times_as_fast"]
        )
    console = Console()
    console.print(table)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
