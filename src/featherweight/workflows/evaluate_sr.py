"""Measure a super-resolution network on a test set by the field's protocol, beside bicubic enlargement."""

from __future__ import annotations

import csv
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data.bicubic import imresize
from featherweight.data.sr_pairs import SRPair, find_sr_set, sr_pairs
from featherweight.errors import UsageError
from featherweight.files import atomic_write
from featherweight.measure.image_quality import psnr, ssim, to_y
from featherweight.workflows.photo_sample import CROP, liveliest
from featherweight.workflows.upscale import Upscaler

MEASURES = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")


def evaluate_sr(
    model: str | Path,
    data: str | Path,
    *,
    scale: int | None = None,
    weights: str | Path | None = None,
    data_root: str | Path | None = None,
    engine: str = "auto",
    threads: int | None = None,
    tile: int | None = 0,
    csv_path: str | Path | None = None,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Measure PSNR and SSIM of every picture of a test set, and of its bicubic enlargement.

    Protocol: luma by BT.601, not rounded; results clipped and rounded to the picture's own depth; as many
    pixels cut from each border as the scale says; means over the pictures. Small pictures that the set does
    not bring are made by MATLAB's bicubic rule.

    Args:
        model: a name from the registry or an ONNX file.
        data: folder or zip file, or `set5` or `bsd100` with `data_root`; see `data.sr_pairs`.
        scale: None takes the network's.
        weights: official or own weights of a network from the registry.
        data_root: folder that holds the named sets.
        engine: `auto`, `compiled` or `onnxruntime`.
        threads: None takes all cores.
        tile: side of a tile in pixels; 0 for whole pictures as the papers do, None to choose.
        csv_path: file for one row a picture.
        report: file for a page with samples before and after.

    Raises:
        DataError: the set is not readable or has no pictures for the scale.
        UsageError: an unknown network, or a scale that it does not have.
        CheckpointError: the weights cannot be had.
    """
    upscaler = Upscaler(model, scale, weights, tile=tile, engine=engine, threads=threads)
    factor = int(upscaler.factor)
    if factor != upscaler.factor or factor < 2:
        raise UsageError(f"Scale is {upscaler.factor:g}. Expected a whole number from 2; give --scale.")
    place = find_sr_set(data, data_root)
    rows, samples = [], []
    for pair in sr_pairs(place, factor):
        row, images = _measure(upscaler, pair, factor)
        rows.append(row)
        if report is not None:
            samples.append((row, *images))
    mean = {key: statistics.fmean(row[key] for row in rows) for key in MEASURES}
    result = {
        "model": upscaler.restorer.name,
        "data": str(data),
        "scale": factor,
        "low_resolution": rows[0]["low_resolution"],
        "engines": upscaler.engines,
        "pictures": rows,
        "mean": mean,
    }
    if csv_path is not None:
        atomic_write(csv_path, _csv(rows))
    if report is not None:
        _report(report, result, samples)
    return result


def _measure(
    upscaler: Upscaler, pair: SRPair, scale: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    high, low = pair.high, pair.low
    if low is None:
        height, width = (side - side % scale for side in high.shape[:2])
        high = high[:height, :width]
        low = imresize(high, 1 / scale)
    start = time.perf_counter()
    restored = upscaler.enlarge(low)
    seconds = time.perf_counter() - start
    high = high[: restored.shape[0], : restored.shape[1]]
    smooth = imresize(low, scale)
    truth = to_y(high)
    row: dict[str, Any] = {
        "name": pair.name,
        "low_resolution": "given" if pair.low is not None else "bicubic",
    }
    for prefix, image in (("", restored), ("bicubic_", smooth)):
        luma = to_y(image)
        row[f"{prefix}psnr"] = psnr(luma, truth, scale)
        row[f"{prefix}ssim"] = ssim(luma, truth, scale)
    row["height"], row["width"], row["seconds"] = *restored.shape[:2], round(seconds, 4)
    return row, (smooth, restored)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _report(path: str | Path, result: dict[str, Any], samples: list) -> None:
    from featherweight.report.before_after import Pair, write_before_after

    pairs = []
    for row, smooth, restored in samples:
        side = CROP * result["scale"]
        height, width = min(side, restored.shape[0]), min(side, restored.shape[1])
        top, left = liveliest(restored, height, width)
        window = (slice(top, top + height), slice(left, left + width))
        caption = (
            f"{row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}; bicubic {row['bicubic_psnr']:.2f} dB, "
            f"{row['bicubic_ssim']:.4f} (whole picture, luma)"
        )
        pairs.append(Pair(row["name"], caption, smooth[window], restored[window]))
    mean = result["mean"]
    remark = (
        f"Mean over {len(pairs)} pictures at {result['scale']} times: {mean['psnr']:.2f} dB and SSIM "
        f"{mean['ssim']:.4f}; bicubic {mean['bicubic_psnr']:.2f} dB and {mean['bicubic_ssim']:.4f}."
    )
    write_before_after(
        path, f"{result['model']} on {Path(result['data']).name}", pairs, result["model"], remark=remark
    )
