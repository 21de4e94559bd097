"""Time one ONNX file in several engines, batch 1: our compiler, onnxruntime, OpenVINO, LiteRT and torch.

Every network becomes a float32 file, an int8 (QDQ) file and, for some, files with 80 and 90 % of the 1x1
weights zero, all with random weights; all engines read the same file and take turns. A row tells how many
times as fast as the quickest peer an engine is, and what share of the machine's peak it reaches, which a loop
of nothing but multiply-adds tells. Zeros count as well: the peers multiply them.

    python benchmarks/engines.py                                   # the usual networks in all forms
    python benchmarks/engines.py mobilenetv2_100 timm/repvit_m0_9.dist_in1k --threads 2
    python benchmarks/engines.py my_network.onnx
    python benchmarks/engines.py --files kept --prepare            # make and convert the files, time nothing

OpenVINO (`pip install featherweight[openvino]`) reads the file itself. LiteRT, whose kernels on the CPU are
XNNPACK's, and torch, eager and compiled, build the same module from its name in a process of their own, in
float only: `--peers openvino,litert,torch,torch.compile`. What is asked for and absent is told, and why.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.console import Console
from rich.table import Table

from engine_files import FORMS, NETWORKS, File, make_files
from engine_peers import OURS, Task, open_engines
from featherweight.compiler.build import target_named
from featherweight.compiler.peak import measure_peak
from featherweight.errors import FeatherweightError, UsageError
from featherweight.measure.count import count_onnx
from featherweight.measure.latency import LEAST_TURNS, Latency, summarize
from featherweight.measure.machine import machine
from side_by_side import CLOCKS, cells, provenance, store

log = logging.getLogger("featherweight")

PEERS = ("openvino", "litert", "torch", "torch.compile")
PACKAGES = ("featherweight", "onnxruntime", "openvino", "torch", "ai-edge-litert")
KEY = ("network", "form", "threads", "engine")
COLUMNS = (
    *KEY,
    *("p50_ms", "low_ms", "high_ms", "clock", "runs", "times_as_fast", "share_of_peak", "difference"),
    *("macs", "input", "date", "machine", "versions"),
)
INT8_PEAK = 4
"""An 8-bit product sums four pairs where a float32 one has one."""


@dataclass(frozen=True)
class Options:
    """How to time: rounds at most, seconds a file, the clock, tuning, the peers, the Python of LiteRT."""

    runs: int = 100
    seconds: float = 20.0
    clock: str = "wall"
    tune: bool = False
    peers: tuple[str, ...] = PEERS
    litert: str = ""


def fixed_input(path: Path) -> tuple[str, np.ndarray]:
    """Return the name of a file's only input, and noise of its shape with a batch of 1.

    Raises:
        UsageError: the network has several inputs, or a free size that is not the batch.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    shape = [1, *inputs[0].shape[1:]]
    if len(inputs) > 1 or not all(isinstance(side, int) for side in shape):
        raise UsageError(f"{path} takes {[i.shape for i in inputs]}; expected one input of fixed size.")
    return inputs[0].name, np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def take_turns(engines: Mapping[str, Any], threads: int, options: Options) -> dict[str, Latency]:
    """Time the engines round by round: a change of the processor's clock hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    began = time.monotonic()
    for turn in range(-1, options.runs):
        if turn >= LEAST_TURNS and time.monotonic() - began > options.seconds:
            break
        for name, engine in engines.items():
            spent = engine.turn(options.clock)
            if turn >= 0:
                times[name].append(spent)
    return {name: summarize(values, threads) for name, values in times.items()}


def measure(file: File, threads: int, options: Options, folder: Path) -> list[dict[str, Any]]:
    """Time all engines on one file; one row for each, one with `absent` for each that could not be had."""
    name, x = fixed_input(file.path)
    task = Task(file, name, x, threads, folder, options.tune, options.litert)
    engines, absent = open_engines(task, set(options.peers))
    try:
        found = take_turns(engines, threads, options)
    finally:
        for engine in engines.values():
            engine.close()
    peak = threads * measure_peak(target_named("native")) * (INT8_PEAK if file.form == "int8" else 1)
    macs = count_onnx(file.path).macs
    shared = {
        **{"network": file.network, "form": file.form, "threads": threads, "clock": options.clock},
        **{"macs": macs, "input": "x".join(map(str, x.shape))},
        **provenance(PACKAGES),
    }
    fastest = min(latency.p50_ms for engine, latency in found.items() if engine != OURS)
    reference = engines["onnxruntime"].answer
    rows: list[dict[str, Any]] = []
    for engine, latency in found.items():
        error = np.abs(engines[engine].answer - reference).max() / max(np.abs(reference).max(), 1e-30)
        rows.append(
            {
                **shared,
                "engine": engine,
                **cells(latency),
                "times_as_fast": f"{fastest / latency.p50_ms:.3f}",
                "share_of_peak": f"{macs / (latency.p50_ms / 1e3) / peak:.3f}",
                "difference": f"{error:.1e}",
            }
        )
    log.info("%s %s, %d thread(s): %s", file.network, file.form, threads, _verdict(found))
    return rows + [{**shared, "engine": engine, "absent": reason} for engine, reason in absent.items()]


def _verdict(found: Mapping[str, Latency]) -> str:
    peer = min((latency.p50_ms, engine) for engine, latency in found.items() if engine != OURS)
    return (
        f"ours {found[OURS].p50_ms:.2f} ms, {peer[1]} {peer[0]:.2f} ms: {peer[0] / found[OURS].p50_ms:.2f} x"
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each form and number of threads: the geometric mean of our ratios, and the least."""
    lines = []
    for form, threads in sorted({(row["form"], row["threads"]) for row in rows}):
        ratios = {
            row["network"]: float(row["times_as_fast"])
            for row in rows
            if (row["form"], row["threads"], row["engine"]) == (form, threads, OURS)
        }
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        least = min(ratios, key=ratios.__getitem__)
        lines.append(
            f"{form}, {threads} thread(s): {mean:.2f} times as fast as the quickest peer of each network "
            f"(geometric mean of {len(ratios)}); least {ratios[least]:.2f} ({least})"
        )
    return lines


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each engine's share of the measured peak, a panel for each form; rows of one number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forms = [form for form in ("file", *FORMS) if form in {row["form"] for row in rows}]
    engines = sorted({row["engine"] for row in rows}, key=lambda engine: (engine != OURS, engine))
    counts = [len({row["network"] for row in rows if row["form"] == form}) for form in forms]
    widths = [max(count, 3) for count in counts]
    figure, panels = plt.subplots(
        1, len(forms), figsize=(0.8 * sum(widths) + 2, 5), squeeze=False, width_ratios=widths
    )
    for panel, form in zip(panels[0], forms, strict=True):
        networks = list(dict.fromkeys(row["network"] for row in rows if row["form"] == form))
        for index, engine in enumerate(engines):
            shares = {
                row["network"]: 100 * float(row["share_of_peak"])
                for row in rows
                if row["form"] == form and row["engine"] == engine
            }
            places = np.arange(len(networks)) + 0.8 * (index / len(engines) - 0.5)
            heights = [shares.get(network, 0.0) for network in networks]
            panel.bar(places, heights, 0.8 / len(engines), align="edge", label=engine)
        panel.axhline(100, color="black", linewidth=0.8)
        panel.set_xticks(range(len(networks)), networks, rotation=35, ha="right")
        panel.set_title(form)
        panel.set_ylabel("share of the measured peak, %")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows; "x" is how many times as fast as the quickest peer."""
    table = Table("network", "form", "threads", "engine", "ms", "95 %", "x", "of peak", "difference")
    for row in rows:
        key = [str(row[name]) for name in KEY]
        if "absent" in row:
            table.add_row(*key, "absent", row["absent"])
            continue
        table.add_row(
            *key,
            *(row["p50_ms"], f"{row['low_ms']} - {row['high_ms']}", row["times_as_fast"]),
            *(f"{float(row['share_of_peak']):.0%}", row["difference"]),
        )
    console.print(table)
    for line in summary([row for row in rows if "absent" not in row]):
        console.print(line)


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="Names or .onnx files.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="1 and all by default.")] = None,
    form: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(FORMS)}.")] = None,
    tune: Annotated[bool, typer.Option(help="Let our compiler time its choices.")] = False,
    peers: Annotated[str, typer.Option(help="Engines beside onnxruntime.")] = ",".join(PEERS),
    litert: Annotated[str, typer.Option(help="Python of an environment with LiteRT.")] = "",
    runs: Annotated[int, typer.Option(help="Turns at most.")] = 100,
    seconds: Annotated[float, typer.Option(help="Time for one file, turns cut to five at least.")] = 20.0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: for one thread on a busy machine.")] = "wall",
    files: Annotated[Path | None, typer.Option(help="Folder that keeps the networks' files.")] = None,
    prepare: Annotated[
        bool, typer.Option(help="Make files, conversions and libraries; store nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of CSV and plot.")] = Path("benchmarks/results/engines"),
) -> None:
    """Time the engines, print a table and store one CSV row per engine and file, and a plot."""
    console = Console()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts, rows = threads or sorted({1, machine()["cores"]}), []
    chosen = tuple(name for name in peers.split(",") if name)
    if clock not in CLOCKS or (clock == "cpu" and max(counts) > 1) or set(chosen) - set(PEERS):
        console.print(
            f"[red]Clock '{clock}' with {counts} threads, peers {peers}. Expected wall, or cpu with 1 "
            f"thread; peers among {', '.join(PEERS)}.[/red]"
        )
        raise typer.Exit(2)
    options = Options(1 if prepare else runs, seconds, clock, tune, chosen, litert)
    try:
        with tempfile.TemporaryDirectory() as folder:
            kept = files or Path(folder)
            kept.mkdir(parents=True, exist_ok=True)
            for name in networks or NETWORKS:
                for file in make_files(name, kept, tuple(form or FORMS)):
                    for count in counts:
                        rows += measure(file, count, options, Path(folder))
        if prepare:
            return
        timed = [row for row in rows if "absent" not in row]
        path = store(out, timed, KEY, COLUMNS)
        stored = list(csv.DictReader(io.StringIO(path.read_text())))
        single = [row for row in stored if row["threads"] == "1"]
        plot(single or stored, path.with_suffix(".png"))
    except FeatherweightError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(error.exit_code) from error
    show(rows, console)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
