"""`featherweight train-sr`: train a super-resolution network on a folder of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table


def train_sr(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder or zip file of photographs.")],
    model: Annotated[str, typer.Option(help="imdn_x2, cfsr_x4, span_s_x2, ...")] = "imdn_x2",
    val: Annotated[
        str | None, typer.Option(help="Validation pictures; default: the last of DATA, held out.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="imdn, cfsr, span or dsclora; default: the network's.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the pictures, of at most 1000 steps each.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Wall time of the training, for example 30m.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a large patch, in pixels.")] = None,
    batch: Annotated[int | None, typer.Option(help="Patches of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    loss: Annotated[str | None, typer.Option(help="l1, l2 or charbonnier.")] = None,
    frequency: Annotated[
        float | None, typer.Option(help="Weight of the distance between spectra, such as 0.05.")
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the averaged weights; 0 for none.")] = None,
    channels: Annotated[int | None, typer.Option(help="Width, if not the published one.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Freeze --weights and train low-rank updates (DSCLoRA).")
    ] = False,
    teacher: Annotated[str | None, typer.Option(help="Network to learn from.")] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="Its weights; default: the published ones.")
    ] = None,
    teacher_channels: Annotated[int | None, typer.Option(help="Its width, if not the published one.")] = None,
    teacher_weight: Annotated[
        float | None, typer.Option(help="Weight of the loss against its image.")
    ] = None,
    affinity: Annotated[float | None, typer.Option(help="Weight of the distance between affinities.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many training pictures.")] = None,
    seed: Annotated[int, typer.Option(help="Decides start, patches and order.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/MODEL.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    json: JsonOption = False,
) -> None:
    """Train MODEL on photographs: small ones are made by MATLAB's bicubic rule, patches cut, flipped, turned.

    Without options the published schedule is followed, where one is published; that takes days. Give --time
    or --epochs for less: the schedule shrinks along.
    """
    from featherweight.workflows.budget import parse_quantity
    from featherweight.workflows.train_sr import TrainSROptions
    from featherweight.workflows.train_sr import train_sr as run_training

    options = TrainSROptions(
        model=model,
        val=val,
        recipe=recipe,
        epochs=epochs,
        time_s=None if time is None else parse_quantity(time, "time"),
        patch=patch,
        batch=batch,
        lr=lr,
        loss=loss,
        frequency=frequency,
        ema=ema,
        channels=channels,
        weights=None if weights is None else str(weights),
        adapt=adapt,
        teacher=teacher,
        teacher_weights=None if teacher_weights is None else str(teacher_weights),
        teacher_channels=teacher_channels,
        teacher_weight=teacher_weight,
        affinity=affinity,
        limit=limit,
        seed=seed,
        threads=threads,
    )
    result = run_training(data, options, out=out, resume=resume)
    if json:
        print_json({**result.metrics, "run_dir": str(result.run_dir)})
        return
    rows = [
        (title, f"{result.metrics[key]['psnr']:.3f}", f"{result.metrics[key]['ssim']:.4f}")
        for title, key in (("trained", "val"), ("before", "val_before"), ("bicubic", "val_bicubic"))
        if key in result.metrics
    ]
    if rows:
        print_table(("validation", ">PSNR dB", ">SSIM"), rows)
    counts = result.metrics["pictures"]
    print_table(
        ("", ""),
        [
            ("network", f"{model}, {result.metrics['params']:,} parameters"),
            ("pictures", f"train {counts['train']}, val {counts['val']}, skipped {counts['skipped']}"),
            ("steps", f"{result.metrics['steps']:,}"),
            ("run folder", str(result.run_dir)),
        ],
    )
