"""Time one ONNX file in several engines: our compiler, onnxruntime, OpenVINO and torch.compile, batch 1.

Every network becomes one float32 file and one int8 (QDQ) file with random weights; all engines read the same
file and run in turns. A row tells how many times as fast as the quickest peer an engine is, and what share of
the machine's measured peak of multiply-adds it reaches.

    python benchmarks/engines.py                                   # the usual networks, float32 and int8
    python benchmarks/engines.py mobilenetv2_100 timm/repvit_m0_9.dist_in1k --threads 2
    python benchmarks/engines.py my_network.onnx

A peer that is not installed is left out (`pip install featherweight[openvino]`). torch.compile takes networks
by name in float32 only, and a minute each to compile: `--torch` asks for it.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from featherweight.compiler import compile_onnx
from featherweight.compiler.build import target_named
from featherweight.compiler.peak import measure_peak
from featherweight.errors import FeatherweightError, UsageError
from featherweight.export.onnx import export_onnx
from featherweight.measure.count import count_onnx
from featherweight.measure.latency import Latency
from featherweight.measure.machine import machine
from featherweight.registry import create_model
from featherweight.shrink.quantize import quantize_onnx
from side_by_side import CLOCKS, cells, in_turns, provenance, store

log = logging.getLogger("featherweight")

OURS = "featherweight"
NETWORKS = (
    *("mobilenetv2_100", "mobilenetv2_035", "ghostnetv2_100", "shufflenetv2_100", "inceptionnext_atto"),
    *("timm/efficientnet_b0", "timm/mobilenetv4_conv_small", "timm/fastvit_t8", "timm/repvit_m0_9"),
)
PACKAGES = ("featherweight", "onnxruntime", "openvino", "torch")
KEY = ("network", "form", "threads", "engine")
COLUMNS = (
    *KEY,
    *("p50_ms", "low_ms", "high_ms", "clock", "runs", "times_as_fast", "share_of_peak", "difference"),
    *("macs", "input", "date", "machine", "versions"),
)
CALIBRATION_IMAGES = 8
INT8_PEAK = 4
"""An 8-bit product sums four pairs where a float32 one has one."""


@dataclass(frozen=True)
class File:
    """One ONNX file of a network, and the module that it came from."""

    network: str
    form: str
    path: Path
    module: torch.nn.Module | None


def make_files(name: str, folder: Path) -> list[File]:
    """Return the files of a network: a path as it is, else float32 and int8 of the registered network.

    Raises:
        UsageError: the name is unknown.
        DataError: the file cannot be read.
    """
    if name.endswith(".onnx"):
        return [File(Path(name).stem, "file", Path(name), None)]
    torch.manual_seed(0)
    model = create_model(name).eval()
    if hasattr(model, "fuse"):
        model.fuse()
    config = getattr(model, "default_cfg", {})
    shape = tuple(config.get("input_size", (3, 224, 224)))
    base = folder / name.replace("/", "_")
    float_path, int8_path = base.with_suffix(".onnx"), base.with_suffix(".int8.onnx")
    export_onnx(model, float_path, shape)
    images = np.random.default_rng(0).standard_normal((CALIBRATION_IMAGES, *shape)).astype(np.float32)
    quantize_onnx(float_path, int8_path, images)
    return [File(name, "float32", float_path, model), File(name, "int8", int8_path, None)]


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


def with_ours(file: File, name: str, x: np.ndarray, threads: int, tune: bool, out: Path) -> Callable[[], Any]:
    """Compile with our compiler and return a call that runs one image."""
    session = compile_onnx(file.path, out, threads=threads, tune=tune)
    return lambda: session.run(None, {name: x})


def with_onnxruntime(file: File, name: str, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """Load into onnxruntime with all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {name: x})


def with_openvino(file: File, name: str, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """Load into OpenVINO for the least latency, in the file's own precision."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file.path)
    model.reshape({name: x.shape})
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: [request.infer({name: x}, share_inputs=True, share_outputs=True)[0]]


def with_torch_compile(file: File, name: str, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """Compile the module itself with torch's inductor, channels last."""
    torch.set_num_threads(threads)
    images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    module = torch.compile(file.module.to(memory_format=torch.channels_last))

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return [module(images).numpy()]

    run()
    return run


def measure(
    file: File, threads: int, runs: int, seconds: float, clock: str, options: Mapping[str, bool], out: Path
) -> list[dict[str, Any]]:
    """Time all engines on one file; one row for each."""
    name, x = fixed_input(file.path)
    engines: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: with_onnxruntime(file, name, x, threads),
        OURS: lambda: with_ours(file, name, x, threads, options["tune"], out),
    }
    if find_spec("openvino"):
        engines["openvino"] = lambda: with_openvino(file, name, x, threads)
    if options["torch"] and file.module is not None:
        engines["torch.compile"] = lambda: with_torch_compile(file, name, x, threads)
    jobs = {engine: load() for engine, load in engines.items()}
    answers = {engine: job()[0] for engine, job in jobs.items()}
    found = in_turns(jobs, runs, threads, seconds, clock)
    peak = threads * measure_peak(target_named("native")) * (INT8_PEAK if file.form == "int8" else 1)
    macs = count_onnx(file.path).macs
    shared = {
        **{"network": file.network, "form": file.form, "threads": threads, "clock": clock, "macs": macs},
        "input": "x".join(map(str, x.shape)),
        **provenance(PACKAGES),
    }
    fastest = min(latency.p50_ms for engine, latency in found.items() if engine != OURS)
    reference = answers["onnxruntime"]
    rows = []
    for engine, latency in found.items():
        error = np.abs(answers[engine] - reference).max() / max(np.abs(reference).max(), 1e-30)
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
    return rows


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

    forms = sorted({row["form"] for row in rows})
    engines = sorted({row["engine"] for row in rows}, key=lambda engine: (engine != OURS, engine))
    figure, panels = plt.subplots(1, len(forms), figsize=(7 * len(forms), 5), squeeze=False)
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
        table.add_row(
            *(str(row[key]) for key in KEY),
            *(row["p50_ms"], f"{row['low_ms']} - {row['high_ms']}", row["times_as_fast"]),
            *(f"{float(row['share_of_peak']):.0%}", row["difference"]),
        )
    console.print(table)
    for line in summary(rows):
        console.print(line)


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="Names or .onnx files.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="1 and all by default.")] = None,
    form: Annotated[str | None, typer.Option(help="float32 or int8 only.")] = None,
    tune: Annotated[bool, typer.Option(help="Let our compiler time its tiles.")] = False,
    with_torch: Annotated[bool, typer.Option("--torch", help="Time torch.compile as well.")] = False,
    runs: Annotated[int, typer.Option(help="Turns at most.")] = 100,
    seconds: Annotated[float, typer.Option(help="Time for one file, turns cut to five at least.")] = 20.0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: for one thread on a busy machine.")] = "wall",
    out: Annotated[Path, typer.Option(help="Folder of CSV and plot.")] = Path("benchmarks/results/engines"),
) -> None:
    """Time the engines, print a table and store one CSV row per engine and file, and a plot."""
    console = Console()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    counts, rows = threads or sorted({1, machine()["cores"]}), []
    if clock not in CLOCKS or (clock == "cpu" and max(counts) > 1):
        console.print(
            f"[red]Clock '{clock}' with {counts} threads. Expected wall, or cpu with 1 thread.[/red]"
        )
        raise typer.Exit(2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in networks or NETWORKS:
                for file in make_files(name, Path(folder)):
                    if form in (None, file.form):
                        for count in counts:
                            work, options = Path(folder) / "compiled", {"tune": tune, "torch": with_torch}
                            rows += measure(file, count, runs, seconds, clock, options, work)
        path = store(out, rows, KEY, COLUMNS)
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
