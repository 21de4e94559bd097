"""Enlarge photographs with a super-resolution network: any size, kind and number of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data.bicubic import imresize
from featherweight.data.photo_files import Sheet, photo_writer
from featherweight.data.photos import read_photo
from featherweight.data.transparency import fill_clear, to_eight_bits, with_alpha
from featherweight.errors import DataError, UsageError, close_matches
from featherweight.measure.machine import machine
from featherweight.registry import list_models
from featherweight.workflows.photo_jobs import FORMATS, Failure, Job, plan_jobs
from featherweight.workflows.photo_sample import Sample
from featherweight.workflows.restorers import Runner, find_restorer
from featherweight.workflows.tiling import Progress, Tiles

log = logging.getLogger("featherweight")

DEFAULT_SCALE = 4
MEMORY_BYTES = 1 << 30
EIGHT_BITS = ("JPEG", "WEBP")


@dataclass(frozen=True)
class Done:
    """One enlarged picture."""

    source: Path
    target: Path
    size: tuple[int, int]
    result_size: tuple[int, int]
    seconds: float
    tiles: int
    rounds: int
    notes: tuple[str, ...]
    crop: tuple[np.ndarray, np.ndarray] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that `--json` prints; sizes as [height, width]."""
        return {
            "source": str(self.source),
            "result": str(self.target),
            "size": list(self.size),
            "result_size": list(self.result_size),
            "seconds": round(self.seconds, 3),
            "tiles": self.tiles,
            "rounds": self.rounds,
            "notes": list(self.notes),
        }


@dataclass
class UpscaleResult:
    """What became of all pictures: enlarged, failed (with the reason), or left because the result exists."""

    model: str
    factor: float
    done: list[Done] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    existing: list[Path] = field(default_factory=list)
    engines: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values that `--json` prints."""
        return {
            "model": self.model,
            "factor": self.factor,
            "engines": self.engines,
            "done": [entry.to_dict() for entry in self.done],
            "failed": [{"source": str(entry.source), "reason": entry.reason} for entry in self.failed],
            "existing": [str(path) for path in self.existing],
        }


class Upscaler:
    """A super-resolution network ready to enlarge arrays and photographs.

    Args:
        model: a name from the registry (`cfsr_x4`, or `cfsr` with a scale) or an ONNX file; None takes CFSR.
        scale: how many times the sides grow; None takes the network's. A network that keeps the size is given
            a bicubic enlargement first, by any factor.
        weights: official or own weights of a network from the registry.
        tile: side of a tile in pixels; 0 for the whole picture at once, None to choose.
        overlap: of neighbouring tiles in pixels on each side; None takes what the network needs.
        engine: `auto`, `compiled` or `onnxruntime`.
        threads: None takes all cores.
        memory_bytes: that the network's maps may take.

    Raises:
        UsageError: an unknown network or engine, a scale that the network does not have, a tile too small.
        CheckpointError: the weights cannot be had.
        DataError: the ONNX file is no super-resolution network.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        scale: float | None = None,
        weights: str | Path | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        engine: str = "auto",
        threads: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        name = choose_model(model, scale)
        self.restorer = find_restorer(name, None if weights is None else Path(weights))
        own = self.restorer.scale
        if scale is not None and not scale >= 1:
            raise UsageError(f"Scale is {scale:g}. Expected at least 1.")
        if scale not in (None, own) and own != 1:
            raise UsageError(
                f"{name} enlarges {own} times; {scale:g} was asked for.{_other_scales(name, scale)}"
            )
        self.factor: float = own if scale is None else scale
        self._runner = Runner(self.restorer, engine, threads or machine()["cores"])
        self._tile, self._overlap, self._memory = tile, overlap, memory_bytes
        margin = self.restorer.margin if overlap is None else overlap
        if margin < 0 or (tile is not None and (tile < 0 or 0 < tile <= 2 * margin)):
            raise UsageError(
                f"Tile {tile} with an overlap of {margin}: expected a tile of over twice the overlap."
            )

    @property
    def engines(self) -> dict[str, int]:
        """Engine -> runs so far."""
        return self._runner.used

    def enlarge(self, pixels: np.ndarray) -> np.ndarray:
        """Return an enlarged copy of (H, W) or (H, W, C), C of 1 or 3, of uint8 or uint16.

        Raises:
            DataError: another shape or type.
        """
        grey = pixels.ndim == 2
        if grey:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or pixels.dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"Cannot enlarge an array of shape {pixels.shape} and type {pixels.dtype}. "
                "Expected (H, W), (H, W, 1) or (H, W, 3) of uint8 or uint16."
            )
        whole = np.concatenate(list(self.tiles(pixels).strips()))
        return whole[:, :, 0] if grey else whole

    def tiles(self, pixels: np.ndarray) -> Tiles:
        """Cut a picture (H, W, C) into tiles, after the bicubic step of a network that keeps the size."""
        if self.restorer.scale == 1 and self.factor != 1:
            height, width = pixels.shape[:2]
            pixels = imresize(pixels, size=(round(height * self.factor), round(width * self.factor)))
        return Tiles(pixels, self._runner, self._tile, self._overlap, self._memory)

    def enlarge_photo(
        self, job: Job, quality: int = 95, crop: bool = False, progress: Progress | None = None
    ) -> Done:
        """Enlarge one file into another.

        Args:
            job: the files.
            quality: of JPEG and WebP, from 1 to 100.
            crop: keep a sample before and after for the report.
            progress: called with pixels of the result.

        Raises:
            DataError: the picture cannot be read, or its format not hold the result.
            WriteError: the result cannot be written.
        """
        start = time.perf_counter()
        photo = read_photo(job.source)
        notes = [*job.notes, *photo.notes]
        pixels = photo.pixels if photo.alpha is None else fill_clear(photo.pixels, photo.alpha)
        tiles = self.tiles(pixels)
        own = self.restorer.scale
        height, width = (side * own for side in tiles.pixels.shape[:2])
        keep_alpha = photo.alpha is not None and job.kind != "JPEG"
        dtype = np.dtype(np.uint8) if job.kind in EIGHT_BITS else photo.pixels.dtype
        if dtype != photo.pixels.dtype:
            notes.append(f"16 bits became 8, which is all that {job.kind} holds.")
        if photo.alpha is not None and not keep_alpha:
            notes.append("JPEG knows no transparency; the picture lies on white.")
        rows = tiles.strips(progress)
        sample = Sample(pixels, self.factor) if crop else None
        if sample:
            rows = sample.watch(rows)
        if photo.alpha is not None:
            rows = with_alpha(rows, photo.alpha, (height, width), keep_alpha)
        channels = photo.pixels.shape[2] + keep_alpha
        sheet = Sheet.like(photo, height, width, channels, dtype, quality)
        with photo_writer(job.target, job.kind, sheet) as writer:
            for strip in rows:
                writer.write(to_eight_bits(strip) if strip.dtype != dtype else strip)
        return Done(
            job.source,
            job.target,
            photo.pixels.shape[:2],
            (height, width),
            time.perf_counter() - start,
            tiles.plan.tiles,
            tiles.rounds,
            tuple(notes),
            sample.pair() if sample else None,
        )


def upscale(
    inputs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    model: str | Path | None = None,
    scale: float | None = None,
    weights: str | Path | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    engine: str = "auto",
    threads: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    format: str | None = None,
    quality: int = 95,
    recursive: bool = False,
    overwrite: bool = False,
    report: str | Path | None = None,
    progress: Callable[[Path, int, int], None] | None = None,
) -> UpscaleResult:
    """Enlarge picture files with a super-resolution network.

    Args:
        inputs: files and folders.
        out: folder of the results, or the one result of a single file; see `plan_jobs` for the default.
        model: see `Upscaler`, as are scale, weights, tile, overlap, engine, threads and memory_bytes.
        format: of the results: jpeg, png, tiff or webp; None keeps each picture's own.
        quality: of JPEG and WebP, from 1 to 100.
        recursive: take folders within folders too.
        overwrite: replace results that exist; otherwise their pictures are left out.
        report: file for a page that shows each picture before and after.
        progress: called with the picture, the pixels done and all pixels of the results.

    Returns:
        What was enlarged, what failed (the rest goes on), and what was left because its result exists.

    Raises:
        UsageError: names or options that cannot be.
        DataError: a folder without a picture, or an ONNX file that is no such network.
        CheckpointError: the weights cannot be had.
        WriteError: a result cannot be written.
    """
    if format is not None and format.lower() not in FORMATS:
        raise UsageError(f"Format '{format}' is unknown. Expected jpeg, png, tiff or webp.")
    if not 1 <= quality <= 100:
        raise UsageError(f"Quality is {quality}. Expected 1 to 100.")
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    upscaler = Upscaler(model, scale, weights, tile, overlap, engine, threads, memory_bytes)
    kind = None if format is None else FORMATS[format.lower()]
    jobs, failed = plan_jobs(given, out, upscaler.factor, kind, recursive)
    result = UpscaleResult(upscaler.restorer.name, upscaler.factor, failed=failed)
    waiting = []
    for job in jobs:
        if job.target.exists() and not overwrite:
            result.existing.append(job.target)
        else:
            waiting.append(job)
    meter = _Meter(waiting, upscaler.factor, progress)
    for job in waiting:
        meter.start(job)
        try:
            result.done.append(upscaler.enlarge_photo(job, quality, report is not None, meter.add))
        except DataError as error:
            result.failed.append(Failure(job.source, str(error)))
    result.engines = dict(upscaler.engines)
    if report is not None and result.done:
        from featherweight.report.before_after import Pair, write_before_after

        pairs = [Pair(entry.source.name, _caption(entry), *entry.crop) for entry in result.done if entry.crop]
        write_before_after(report, f"Enlarged with {result.model}", pairs, result.model)
    return result


class _Meter:
    """Counts pixels over all pictures; a picture that failed counts as done."""

    def __init__(
        self, jobs: Sequence[Job], factor: float, progress: Callable[[Path, int, int], None] | None
    ) -> None:
        self._sizes = {job: round(job.height * job.width * factor**2) for job in jobs}
        self._progress, self._total = progress, sum(self._sizes.values())
        self._before, self._done = 0, 0
        self._job: Job | None = None

    def start(self, job: Job) -> None:
        """Go on with another picture."""
        self._before += self._sizes[self._job] if self._job else 0
        self._job, self._done = job, 0
        self.add(0)

    def add(self, pixels: int) -> None:
        """Count pixels of the result."""
        self._done += pixels
        if self._progress and self._job:
            self._progress(self._job.source, self._before + self._done, self._total)


def choose_model(model: str | Path | None, scale: float | None) -> str:
    """Return the name of a network: CFSR where none is given, and `imdn_x2` for `imdn` with scale 2.

    Raises:
        UsageError: a family of networks without one for this scale.

    >>> choose_model(None, 2), choose_model("imdn", 4)
    ('cfsr_x2', 'imdn_x4')
    """
    name = "cfsr" if model is None else str(model)
    if name.endswith(".onnx") or Path(name).suffix:
        return name
    known = list_models(task="restore")
    if name in known:
        return name
    sized = f"{name}_x{DEFAULT_SCALE if scale is None else scale:g}"
    if sized in known:
        return sized
    family = [entry for entry in known if entry.startswith(f"{name}_")]
    if family:
        raise UsageError(f"There is no {sized}. Expected one of {', '.join(family)}.")
    raise UsageError(
        f"No super-resolution network '{name}'.{close_matches(name, known)} "
        f"Expected {', '.join(known)}, or an .onnx file."
    )


def _other_scales(name: str, scale: float | None) -> str:
    family = name.rpartition("_x")[0]
    others = [entry for entry in list_models(task="restore") if family and entry.startswith(f"{family}_x")]
    if (wanted := f"{family}_x{scale:g}") in others:
        return f" Use --model {wanted}."
    return f" Expected one of {', '.join(others)}." if others else " Leave --scale out."


def _caption(entry: Done) -> str:
    (height, width), (large_h, large_w) = entry.size, entry.result_size
    return f"{width} x {height} pixels became {large_w} x {large_h} in {entry.seconds:.1f} s"
