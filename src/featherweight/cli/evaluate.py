"""`featherweight evaluate`: accuracy of a run's exported models on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or an .onnx file that fit wrote.")],
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Folder, CSV, .npz or built-in name; its test split is used."),
    ],
    data_root: Annotated[
        Path | None, typer.Option(help="Folder holding the built-in data sets, offline.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the split where DATA has none; default: the run's.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure the exported variants on the test split of DATA.

    Prints accuracy with its 95 % interval, and precision and recall of every class.
    """
    from featherweight.workflows.evaluate import evaluate as run_evaluation

    result = run_evaluation(run, data, data_root=data_root, seed=seed)
    if json:
        print_json(result)
        return
    print_text(f"{result['images']} test images of {result['data']}, {len(result['classes'])} classes\n")
    print_table(
        ("variant", ">accuracy", ">95 % interval", ">bytes"),
        [
            (
                name,
                f"{entry['test_accuracy']:.2%}",
                "{:.2%} - {:.2%}".format(*entry["test_accuracy_interval"]),
                f"{entry['size_bytes']:,}",
            )
            for name, entry in result["variants"].items()
        ],
    )
    for name, entry in result["variants"].items():
        print_text("")
        print_table(
            (f"class ({name})", ">precision", ">recall", ">images"),
            [
                (row["class"], _share(row["precision"]), _share(row["recall"]), str(row["images"]))
                for row in entry["per_class"]
            ],
        )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
