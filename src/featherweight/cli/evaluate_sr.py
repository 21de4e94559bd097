"""`featherweight evaluate-sr`: PSNR and SSIM of a super-resolution network on a test set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def evaluate_sr(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="cfsr_x4, imdn_x2, ... or an .onnx file.")],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder or zip with HR (and LR) pictures; set5 or bsd100 with --data-root."
        ),
    ],
    scale: Annotated[int | None, typer.Option(help="Default: the network's.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Official or own weights (.pth, .safetensors) of the network.")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder holding the named sets.")] = None,
    engine: Annotated[str, typer.Option(help="auto, compiled or onnxruntime.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    csv: Annotated[Path | None, typer.Option(help="File for one row a picture.")] = None,
    report: Annotated[Path | None, typer.Option(help="Page with samples before and after.")] = None,
    json: JsonOption = False,
) -> None:
    """Measure PSNR and SSIM on luma, beside bicubic enlargement.

    The papers' protocol: whole pictures, luma not rounded, as many border pixels cut as the scale says. Small
    pictures that the set does not bring are made by MATLAB's bicubic rule.
    """
    from featherweight.workflows.evaluate_sr import evaluate_sr as run_evaluation

    result = run_evaluation(
        model,
        data,
        scale=scale,
        weights=weights,
        data_root=data_root,
        engine=engine,
        threads=threads,
        csv_path=csv,
        report=report,
    )
    if json:
        print_json(result)
        return
    kind = "given" if result["low_resolution"] == "given" else "made by bicubic"
    print_text(f"{len(result['pictures'])} pictures of {data}, {result['scale']} times, small ones {kind}\n")
    columns = ("picture", ">PSNR dB", ">SSIM", ">bicubic dB", ">bicubic SSIM")
    rows = [*result["pictures"], {"name": "mean", **result["mean"]}]
    print_table(
        columns,
        [
            (
                row["name"],
                f"{row['psnr']:.3f}",
                f"{row['ssim']:.4f}",
                f"{row['bicubic_psnr']:.3f}",
                f"{row['bicubic_ssim']:.4f}",
            )
            for row in rows
        ],
    )
