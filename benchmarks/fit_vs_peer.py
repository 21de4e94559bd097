"""Compare `featherweight.fit` with what a user of timm would do by hand in the same wall time.

The peer is a plain pipeline of its own: a network of timm trained from scratch (AdamW, cosine, random crops
and flips, EMA), exported to ONNX and quantised by onnxruntime (static QDQ, per channel). Both see the same
splits, run one after the other, and are judged on the same test images; the four files are timed in turns.

    python benchmarks/fit_vs_peer.py fashion-mnist --time 5m --max-latency 0.5ms --max-size 0.8MB
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from featherweight.data.augment import default_augment
from featherweight.data.dataset import Dataset, Split
from featherweight.data.preprocess import Preprocess
from featherweight.data.sources import load_dataset
from featherweight.errors import FeatherweightError, UsageError
from featherweight.export.onnx import run_onnx
from featherweight.measure.accuracy import wilson_interval
from featherweight.measure.latency import compare
from featherweight.measure.machine import machine
from featherweight.workflows.budget import parse_quantity
from featherweight.workflows.fit import fit
from side_by_side import provenance, store
from timm_peer import PeerTrainer, export_peer, prepare, right_share, statistics_of

log = logging.getLogger("featherweight")

KEY = ("data", "system", "variant")
COLUMNS = (
    *KEY,
    *("date", "machine", "versions", "seed", "time_budget_s", "wall_s", "epochs", "model", "test_images"),
    *("accuracy", "accuracy_low", "accuracy_high", "latency_p50_ms", "latency_low_ms", "latency_high_ms"),
    *("size_bytes", "deployed"),
)
TIMED_RUNS = 200


@dataclass(frozen=True)
class Contender:
    """One finished system: its files by variant, and what reached them."""

    system: str
    model: str
    files: Mapping[str, Path]
    preprocess: Preprocess
    epochs: float
    wall_s: float
    deployed: str


def run_peer(dataset: Dataset, name: str, side: int, time_s: float, seed: int, out: Path) -> Contender:
    """Train, export and quantise timm's network `name` within `time_s` seconds of wall time.

    The network that is kept is the last one or its EMA, whichever is better on the validation split.
    """
    import timm

    began = time.perf_counter()
    torch.set_num_threads(machine()["cores"])
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    train, val = (prepare(split, side, dataset.mode) for split in (dataset.train, dataset.val))
    mean, std = statistics_of(train)
    preprocess = Preprocess(size=(side, side), mean=mean, std=std, mode="RGB")
    model = timm.create_model(name, pretrained=False, num_classes=len(dataset.classes))
    trainer = PeerTrainer(model, train, preprocess, default_augment(dataset).flip, seed)
    # Validating, exporting and quantising this network take about six seconds.
    ending_s = min(max(8.0, 0.03 * time_s), time_s / 2)
    steps = trainer.plan(time_s - ending_s - (time.perf_counter() - began))
    epochs = steps / trainer.steps_per_epoch
    log.info("%s: %d steps (%.1f epochs), bfloat16 %s", name, steps, epochs, trainer.bf16)
    averaged = trainer.train(steps)
    best = max((averaged, model), key=lambda net: right_share(net, val, preprocess))
    files = export_peer(best, train, preprocess, out)
    wall_s = time.perf_counter() - began
    return Contender(f"timm/{name}@{side}", name, files, preprocess, epochs, wall_s, "int8")


def read_fit(run: Path, dataset: Dataset, seed: int, time_s: float) -> Contender:
    """Read a finished run of `fit` back.

    Raises:
        UsageError: the folder holds no finished run, or one of another seed, time or set of classes.
    """
    try:
        metrics, config, progress = (
            json.loads((run / f"{part}.json").read_text()) for part in ("metrics", "config", "progress")
        )
        labels = (run / "labels.txt").read_text().splitlines()
        preprocess = Preprocess.from_json((run / "preprocess.json").read_text())
        history = (run / "train" / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{run} holds no finished run of fit: {error}.") from error
    expected = {"seed": seed, "time_s": time_s, "classes": list(dataset.classes)}
    found = {"seed": config["seed"], "time_s": config["time_s"], "classes": labels}
    wrong = [f"{key} {found[key]}, expected {expected[key]}" for key in found if found[key] != expected[key]]
    if wrong:
        raise UsageError(f"The run in {run} does not fit this comparison: {'; '.join(wrong)}.")
    files = {variant: run / file for variant, file in metrics["files"].items()}
    model = f"{metrics['model']} x{metrics['width']:g} @{metrics['input'][1]}"
    wall_s = sum(progress["wall_s"].values())
    return Contender("featherweight", model, files, preprocess, len(history), wall_s, metrics["chosen"])


def judge(path: Path, preprocess: Preprocess, test: Split) -> int:
    """Return how many test images an ONNX file answers rightly."""
    pixels, right = test.decode(preprocess.size, preprocess.mode, preprocess.resize), 0
    for low in range(0, len(test), 1024):
        images = preprocess.normalize(pixels[low : low + 1024]).transpose(0, 3, 1, 2)
        answers = run_onnx(path, images, threads=machine()["cores"])
        right += int((answers.argmax(1) == test.labels[low : low + 1024]).sum())
    return right


def measure(
    contenders: Sequence[Contender], dataset: Dataset, seed: int, time_s: float
) -> list[dict[str, Any]]:
    """Judge every file on the test split, time all of them in turns, and return one row per file."""
    entries = [(one, variant, path) for one in contenders for variant, path in one.files.items()]
    latencies = compare([path for *_, path in entries], threads=1, runs=TIMED_RUNS).latencies
    packages = ("featherweight", "torch", "timm", "onnxruntime")
    count = len(dataset.test)
    shared = {
        "data": dataset.name,
        **provenance(packages),
        "seed": seed,
        "time_budget_s": f"{time_s:g}",
        "test_images": count,
    }
    rows = []
    for (one, variant, path), latency in zip(entries, latencies, strict=True):
        right = judge(path, one.preprocess, dataset.test)
        low, high = wilson_interval(right, count)
        rows.append(
            {
                **shared,
                **{"system": one.system, "variant": variant, "model": one.model},
                **{"epochs": f"{one.epochs:.1f}", "wall_s": f"{one.wall_s:.1f}"},
                **{"accuracy": f"{right / count:.4f}", "accuracy_low": f"{low:.4f}"},
                **{"accuracy_high": f"{high:.4f}", "latency_p50_ms": f"{latency.p50_ms:.4f}"},
                "latency_low_ms": f"{latency.interval[0]:.4f}",
                "latency_high_ms": f"{latency.interval[1]:.4f}",
                "size_bytes": path.stat().st_size,
                "deployed": int(variant == one.deployed),
            }
        )
    return rows


def show(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print the rows as a table; a star marks the variant that each system would deploy."""
    table = Table("system", "variant", "model", "epochs", "wall s", "test accuracy", "95 %", "p50 ms", "kB")
    for row in rows:
        interval = f"{100 * float(row['accuracy_low']):.2f} - {100 * float(row['accuracy_high']):.2f}"
        star = " *" if row["deployed"] else ""
        table.add_row(
            *(row["system"], f"{row['variant']}{star}", row["model"], row["epochs"], row["wall_s"]),
            *(f"{100 * float(row['accuracy']):.2f} %", interval, f"{float(row['latency_p50_ms']):.3f}"),
            f"{row['size_bytes'] / 1e3:,.0f}",
        )
    console.print(table)


def main(
    data: Annotated[str, typer.Argument(help="Anything that featherweight.load_dataset takes.")],
    time_budget: Annotated[str, typer.Option("--time", help="Wall time of each system.")] = "5m",
    max_latency: Annotated[str | None, typer.Option(help="Budget of fit, for one image.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Budget of fit, for the file.")] = None,
    seed: Annotated[int, typer.Option(help="Of splits, order and weights.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results/fit_vs_peer"),
    peer: Annotated[str, typer.Option(help="A network of timm.")] = "mobilenetv3_small_050",
    peer_size: Annotated[int, typer.Option(help="Its input side in pixels.")] = 64,
    skip_fit: Annotated[Path | None, typer.Option(help="Take this finished run of fit instead.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder for the models.")] = Path("runs/fit_vs_peer"),
    data_root: Annotated[Path | None, typer.Option(help="Folder that holds a built-in set.")] = None,
) -> None:
    """Run fit and the peer one after the other, measure both, and store one CSV row per file."""
    console = Console()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        time_s = parse_quantity(time_budget, "time")
        dataset = load_dataset(data, data_root=data_root, seed=seed)
        work = runs / f"{dataset.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
        torch.set_num_threads(machine()["cores"])
        if skip_fit is None:
            limits = {"max_latency": max_latency, "max_size": max_size, "data_root": data_root}
            fit(data, time=time_s, seed=seed, out=work / "fit", **limits)
        ours = read_fit(skip_fit or work / "fit", dataset, seed, time_s)
        theirs = run_peer(dataset, peer, peer_size, time_s, seed, work / "peer")
        rows = measure([ours, theirs], dataset, seed, time_s)
        path = store(out, rows, KEY, COLUMNS)
    except FeatherweightError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    show(rows, console)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
