"""`featherweight predict`: classify images with an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_text


def predict(
    run_or_onnx: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ONNX", help="A run folder or an .onnx file that fit wrote.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to print for each image.")] = 3,
    engine: Annotated[
        str, typer.Option(help="onnxruntime, or compiled: the library that fit made of the same file.")
    ] = "onnxruntime",
    json: JsonOption = False,
) -> None:
    """Classify images with an exported model.

    Uses the engine alone, without torch, and starts in under a second.
    """
    from featherweight.workflows.predict import Predictor

    done = []
    try:
        for prediction in Predictor(run_or_onnx, engine=engine).predict(images, top):
            done.append(prediction.to_dict())
            if not json:
                classes = ", ".join(f"{name} {share:.1%}" for name, share in prediction.top)
                print_text(f"{prediction.path}: {classes}")
    finally:
        if json:
            print_json(done)
