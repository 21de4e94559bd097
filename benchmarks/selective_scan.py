"""Time the forms of the selective scan against each other: the loop over tokens, chunks, and on a GPU the
kernel.

All forms run in turns on the same tensors, so that a change of the processor's clock hits all alike. A row is
the median of `--runs` turns with its 95 % interval; "x" is how many times faster than the loop.

    python benchmarks/selective_scan.py --threads 1
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table

from featherweight.blocks.selective_scan import selective_scan
from featherweight.measure.latency import Latency, summarize

SHAPES = ((1, 144, 224, 1), (1, 1024, 320, 1), (1, 3136, 96, 1), (1, 3136, 320, 1), (4, 3136, 96, 1))
"""Batch, length, channels, states: MobileMamba's first stage in T2 and in B4, then 56 x 56 tokens."""


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


def in_turns(jobs: dict[str, Callable[[], None]], runs: int, threads: int) -> dict[str, Latency]:
    """Time jobs one after another, `runs` times round, after a round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(runs + 1):
        for name, job in jobs.items():
            began = time.perf_counter_ns()
            job()
            if turn:
                times[name].append((time.perf_counter_ns() - began) / 1e6)
    return {name: summarize(values, threads) for name, values in times.items()}


def main(
    threads: Annotated[int, typer.Option(help="threads of PyTorch")] = 1,
    runs: Annotated[int, typer.Option(help="turns per shape")] = 50,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Print one table of medians in milliseconds."""
    torch.set_num_threads(threads)
    methods = ["sequential", "chunked", *(["triton"] if device == "cuda" else [])]
    table = Table(title=f"selective scan, float32, {device}, {threads} thread(s), median of {runs}")
    for heading in ("B x L x D x N", "pass", "method", "ms", "95 % interval", "x"):
        table.add_column(heading)
    for shape in SHAPES:
        given = tensors(*shape, device)
        for train in (False, True):
            jobs = {m: lambda m=m: step(m, given, train) for m in methods}  # noqa: B023
            found = in_turns(jobs, runs, threads)
            for method, latency in found.items():
                low, high = latency.interval
                ratio = found["sequential"].p50_ms / latency.p50_ms
                row = (" x ".join(map(str, shape)), "train" if train else "forward", method)
                table.add_row(*row, f"{latency.p50_ms:.2f}", f"{low:.2f}-{high:.2f}", f"{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
