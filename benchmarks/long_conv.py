"""Time long convolutions against the plain way, by the library's transforms: time and peak of memory.

Causal, a kernel as long as the row, rows of 256 to 1,048,576 numbers, about 2 M numbers in all. The ways run
in turns on the same tensors. A row is the median of the turns with its 95 % interval; "x" is how many times
as fast as the library. The peak is that of a fresh process which runs one way alone, above what it held
before.

    python benchmarks/long_conv.py --threads 1
    python benchmarks/long_conv.py --device cuda      # Triton kernels and the gated form, on a GPU
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from rich.console import Console
from rich.table import Table

from featherweight.blocks.long_conv import long_conv
from side_by_side import cells, in_turns, provenance, store

NUMBERS = 2**21
"""Numbers in a tensor of rows; fewer than two rows are never taken."""

LENGTHS = tuple(2**power for power in range(8, 21))
KEY = ("device", "threads", "pass", "gated", "length", "method")
COLUMNS = (
    *KEY,
    *("batch", "channels", "p50_ms", "low_ms", "high_ms", "runs", "times_as_fast", "peak_bytes"),
    *("date", "machine", "versions"),
)
METHODS = {"cpu": ("library", "native", "auto"), "cuda": ("library", "auto")}


def tensors(length: int, gated: bool, device: str) -> list[torch.Tensor | None]:
    """Draw rows (B, H, L), taps (H, L) and gates; 8 samples, or fewer where rows are long."""
    rows = max(2, NUMBERS // length)
    batch = min(8, rows)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, rows // batch, length)
    drawn = [torch.randn(shape, generator=generator), torch.randn(shape[1:], generator=generator)]
    drawn += [torch.rand(shape, generator=generator) if gated else None for _ in range(2)]
    return [None if x is None else x.to(device).requires_grad_() for x in drawn]


def step(method: str, given: list[torch.Tensor | None], train: bool) -> None:
    """Convolve once, with the backward pass if asked."""
    u, taps, pre, post = given
    with torch.set_grad_enabled(train):
        y = long_conv(u, taps, pre_gate=pre, post_gate=post, method=method)
    if train:
        torch.autograd.grad(y, [x for x in given if x is not None], torch.ones_like(y))
    if y.is_cuda:
        torch.cuda.synchronize()


def peak(method: str, length: int, gated: bool, train: bool, threads: int, device: str) -> int:
    """Return the bytes that one call needs beyond its inputs, in a process of its own."""
    words = (method, str(length), str(int(gated)), str(int(train)), str(threads), device)
    done = subprocess.run(
        [sys.executable, __file__, "--peak", *words], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def print_peak(method: str, length: str, gated: str, train: str, threads: str, device: str) -> None:
    """Run one way alone and print by how many bytes the memory of this process rose at most."""
    torch.set_num_threads(int(threads))
    # Libraries load what they need; few rows, for memory that is freed stays with the process.
    few = [None if x is None else x[..., :2, :] for x in tensors(256, gated == "1", device)]
    step(method, few, train == "1")
    given = tensors(int(length), gated == "1", device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(method, given, train == "1")
        print(torch.cuda.max_memory_allocated() - held)
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident("VmRSS")
    step(method, given, train == "1")
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Return the bytes of this process that Linux states under a name."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(
    lengths: list[int], gated: bool, threads: int, runs: int, seconds: float, device: str, memory: bool
) -> list[dict[str, Any]]:
    """Time all ways at every length, forward and with the backward pass; one row for each."""
    torch.set_num_threads(threads)
    processor = torch.cuda.get_device_name() if device == "cuda" else ""
    shared = {"device": device, "threads": threads, "gated": int(gated), **provenance(processor=processor)}
    rows = []
    for length in lengths:
        given = tensors(length, gated, device)
        for train in (False, True):
            jobs = {name: partial(step, name, given, train) for name in METHODS[device]}
            found = in_turns(jobs, runs, threads, seconds)
            for name, latency in found.items():
                rows.append(
                    {
                        **{
                            **shared,
                            "pass": "train" if train else "forward",
                            "length": length,
                            "method": name,
                        },
                        **{"batch": len(given[0]), "channels": given[0].shape[1], **cells(latency)},
                        "times_as_fast": f"{found['library'].p50_ms / latency.p50_ms:.2f}",
                        "peak_bytes": peak(name, length, gated, train, threads, device)
                        if memory and name != "auto"
                        else "",
                    }
                )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot how many times as fast each way is, over the length."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, style in (("forward", "-"), ("train", "--")):
        for method in sorted({row["method"] for row in rows} - {"library"}):
            line = [row for row in rows if row["method"] == method and row["pass"] == kind]
            values = [(int(row["length"]), float(row["times_as_fast"])) for row in line]
            if values:
                axes.plot(*zip(*sorted(values), strict=True), style, marker="o", label=f"{method}, {kind}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="length of a row", ylabel="times as fast as the library", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def geometric_mean(rows: list[dict[str, Any]], method: str, kind: str) -> float:
    """Return the mean speed of a way over all lengths, relative to the library."""
    found = [float(r["times_as_fast"]) for r in rows if r["method"] == method and r["pass"] == kind]
    return math.exp(sum(map(math.log, found)) / len(found))


def main(
    lengths: Annotated[str, typer.Option(help="Lengths of rows, with commas between.")] = ",".join(
        map(str, LENGTHS)
    ),
    gated: Annotated[bool, typer.Option("--gated", help="With gates before and after.")] = False,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    runs: Annotated[int, typer.Option(help="Turns at most.")] = 30,
    seconds: Annotated[float, typer.Option(help="Time for one length and pass.")] = 3.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[
        bool, typer.Option(help="Also measure peaks of memory, in processes of their own.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(__file__).parent
    / "results"
    / "long_conv",
) -> None:
    """Time the ways to compute a long convolution and store the rows."""
    rows = measure(
        [int(length) for length in lengths.split(",")], gated, threads, runs, seconds, device, memory
    )
    columns = ("length", "pass", "method", "p50_ms", "times_as_fast", "peak_bytes")
    table = Table(*columns, title=f"{device}, {threads} thread{'s' * (threads > 1)}{', gated' * gated}")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    console = Console()
    console.print(table)
    for method in METHODS[device][1:]:
        means = {kind: geometric_mean(rows, method, kind) for kind in ("forward", "train")}
        text = f"{means['forward']:.2f} x forward, {means['train']:.2f} x with backward"
        console.print(f"{method}: {text} (geometric mean)")
    path = store(out, rows, KEY, COLUMNS)
    with path.open(encoding="utf-8") as file:
        stored = [row for row in csv.DictReader(file) if row["gated"] == str(int(gated))]
    draw(
        [row for row in stored if row["device"] == device],
        path.with_suffix(".gated.png" if gated else ".png"),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        typer.run(main)
