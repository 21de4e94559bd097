"""`featherweight fit`: the main job, from images and a budget to a small model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def fit(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder per class, a CSV of path,label, an .npz, "
            "or digits, mnist, fashion-mnist, cifar10.",
        ),
    ],
    max_latency: Annotated[
        str | None, typer.Option(help="Of one image on one thread of this machine, for example 5ms.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Of the deployed file, for example 1MB.")] = None,
    max_macs: Annotated[
        str | None, typer.Option(help="Multiply-adds for one image, for example 50M.")
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Percentage points of validation accuracy that int8 may lose.")
    ] = 1.0,
    time: Annotated[str, typer.Option(help="Wall time for everything, for example 30m.")] = "30m",
    models: Annotated[
        str | None, typer.Option(help="Networks to search, with commas; default: all that suit.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides splits, order, augmentation and weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder holding the built-in data sets, offline.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Distil from the run folder of an earlier fit, or from timm/NAME.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from the published weights where there are any.")
    ] = False,
    epochs: Annotated[
        float | None, typer.Option(help="Length of the final training; makes a run repeatable to the bit.")
    ] = None,
    devices: Annotated[int, typer.Option(help="Processes to train with.")] = 1,
    json: JsonOption = False,
) -> None:
    """Find and train the best small classifier for DATA within a budget."""
    from featherweight.errors import BudgetError
    from featherweight.workflows.fit import fit as run_fit

    result = run_fit(
        data,
        max_latency=max_latency,
        max_size=max_size,
        max_macs=max_macs,
        max_drop=max_drop,
        time=time,
        models=models,
        seed=seed,
        out=out,
        resume=resume,
        data_root=data_root,
        teacher=teacher,
        pretrained=pretrained,
        epochs=epochs,
        devices=devices,
        command=shlex.join(["featherweight", *sys.argv[1:]]),
    )
    if json:
        print_json(result.metrics)
    else:
        _print_result(result)
    if result.violations:
        raise BudgetError(
            f"Budget not met by the best model: {'; '.join(result.violations)}. It was written to "
            f"{result.run_dir} all the same. Loosen the limit, or give more --time."
        )


def _print_result(result) -> None:
    from featherweight.cli.output import print_renderable
    from featherweight.report.tables import candidates_table, variants_table

    tried = [point for point in result.content.candidates if point.accuracy is not None or point.chosen]
    print_renderable(candidates_table(tried))
    print_renderable(variants_table(result.content.variants))
    counts = result.content.dataset["images"]
    print_table(
        ("", ""),
        [
            ("network", f"{result.metrics['model']} x{result.metrics['width']:g}"),
            ("deployed", result.metrics["files"][result.metrics["chosen"]]),
            ("images", f"train {counts['train']}, val {counts['val']}, test {counts['test']}"),
            ("wall time", f"{sum(result.metrics['wall_s'].values()):.0f} s"),
            ("run folder", str(result.run_dir)),
        ],
    )
    print_text(f"Report: {result.report_path}")
