"""`featherweight upscale`: enlarge photographs with a super-resolution network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_text


def upscale(
    inputs: Annotated[list[Path], typer.Argument(metavar="PICTURE|FOLDER...", help="Pictures and folders.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder, or the result of one picture. Default: NAME_x4 beside each, FOLDER_x4."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="How many times the sides grow. Default: 4.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="cfsr_x4 (default), imdn_x2, dscf_x4, ... or your own .onnx file, values 0 to 1."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Official or own weights (.pth, .safetensors) of the network.")
    ] = None,
    tile: Annotated[str, typer.Option(help="Side of a tile in pixels, auto, or 0 for no tiles.")] = "auto",
    overlap: Annotated[
        str, typer.Option(help="Of tiles, in pixels on each side; auto: what the network needs.")
    ] = "auto",
    memory: Annotated[str, typer.Option(help="That the network's maps may take.")] = "1GB",
    engine: Annotated[str, typer.Option(help="auto, compiled or onnxruntime.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    format: Annotated[
        str | None, typer.Option(help="jpeg, png, tiff or webp. Default: as each picture, else png.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP.", min=1, max=100)] = 95,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Folders within folders too.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Page with a sample of each picture, before and after.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Enlarge photographs of any size; keeps depth, transparency, EXIF and colour profile.

    Unreadable pictures are skipped and reported; the others are written and the exit code is 3. Results that
    exist are left alone; the exit code is 2 where that leaves nothing to do.
    """
    from featherweight.errors import DataError, UsageError
    from featherweight.workflows.upscale import upscale as run_upscale

    with _bar() as progress:
        result = run_upscale(
            inputs,
            out,
            model=model,
            scale=scale,
            weights=weights,
            tile=_pixels("tile", tile),
            overlap=_pixels("overlap", overlap),
            engine=engine,
            threads=threads,
            memory_bytes=parse_bytes(memory),
            format=format,
            quality=quality,
            recursive=recursive,
            overwrite=overwrite,
            report=report,
            progress=progress,
        )
    if json:
        print_json(result.to_dict())
    else:
        for entry in result.done:
            height, width = entry.result_size
            print_text(f"{entry.target}: {width} x {height} pixels, {entry.seconds:.1f} s")
            for note in entry.notes:
                print_text(f"  {note}")
        for path in result.existing:
            print_text(f"{path} exists and was left. Replace it with --overwrite.")
    if result.failed:
        reasons = "; ".join(entry.reason for entry in result.failed)
        raise DataError(f"{len(result.failed)} of {_count(result)} pictures skipped: {reasons}")
    if result.existing and not result.done:
        raise UsageError(f"All {len(result.existing)} results exist. Replace them with --overwrite.")


def parse_bytes(text: str) -> int:
    """Read a size in bytes.

    Raises:
        UsageError: the text is no size.

    >>> parse_bytes("1GB"), parse_bytes("512 MB")
    (1000000000, 512000000)
    """
    from featherweight.errors import UsageError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise UsageError(f"--memory {text}: expected a size such as 512MB or 2GB.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def _pixels(option: str, text: str) -> int | None:
    from featherweight.errors import UsageError

    if text == "auto":
        return None
    if not text.isdecimal():
        raise UsageError(f"--{option} {text}: expected auto or a number of pixels.")
    return int(text)


def _count(result) -> int:
    return len(result.done) + len(result.failed) + len(result.existing)


@contextmanager
def _bar() -> Iterator[Callable[[Path, int, int], None] | None]:
    """Show a bar with the time left on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("")

        def show(source: Path, done: int, total: int) -> None:
            bar.update(task, description=source.name, completed=done, total=total)

        yield show
