"""Time super-resolution networks for each megapixel of their result, and weigh 8 bits against 32.

    python benchmarks/super_resolution.py prepare cfsr_x4 --weights DIR --data DIR --work DIR
    python benchmarks/super_resolution.py quantise cfsr_x4 --data DIR --work DIR
    python benchmarks/super_resolution.py time cfsr_x4 --work DIR

`prepare` exports the official weights, measures them on Set5 and compiles them; `quantise` makes the 8-bit
file on patches of T91 and does the same; `time` runs everything in turns on one tile: ours, onnxruntime
and OpenVINO on the same files, and bicubic enlargement by Pillow and by ours. Rows go to
`results/super_resolution/<machine>.csv`.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featherweight.compiler import Session, compile_onnx
from featherweight.data.bicubic import imresize
from featherweight.errors import FeatherweightError
from featherweight.export.onnx import open_session
from featherweight.files import atomic_write, atomic_write_json
from featherweight.measure.image_quality import psnr, to_y
from featherweight.measure.machine import machine_id
from featherweight.shrink.quantize import quantize_within
from featherweight.workflows.restorers import find_restorer
from side_by_side import cells, in_turns, merge_rows, provenance

RESULTS = Path(__file__).parent / "results" / "super_resolution"
OFFICIAL = {
    "imdn_x2": "IMDN_x2.pth",
    "imdn_x4": "IMDN_x4.pth",
    "cfsr_x2": "CFSR_x2.pth",
    "cfsr_x4": "CFSR_x4.pth",
    "dscf_x4": "DSCF_x4.pth",
}
COLUMNS = (
    *("network", "engine", "precision", "tile", "scale", "threads", "s_per_output_mp"),
    *("p50_ms", "low_ms", "high_ms", "runs", "set5_psnr_db", "float_layers", "date", "machine", "versions"),
)
KEY = ("network", "engine", "precision", "tile")
PATCH, CALIBRATION, HELD_OUT = 48, 16, 12
MAX_DROP_DB = 0.05
"""On held-out patches of T91; Set5, which the row tells, is not looked at while choosing."""


def patches(archive: Path, scale: int, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (small, large) patches of T91, one of each picture that is large enough."""
    rng, found, side = np.random.default_rng(seed), [], PATCH * scale
    with zipfile.ZipFile(archive) as pictures:
        names = sorted(
            name for name in pictures.namelist() if name.lower().endswith((".png", ".bmp", ".jpg"))
        )
        for name in rng.permutation(names):
            image = np.asarray(Image.open(io.BytesIO(pictures.read(name))).convert("RGB"))
            if min(image.shape[:2]) < side or len(found) == count:
                continue
            top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
            large = image[top : top + side, left : left + side]
            found.append((imresize(large, 1 / scale), large))
    return found


def set5(archive: Path, scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the five pairs (small, large)."""
    with zipfile.ZipFile(archive) as pictures:
        return [
            tuple(
                np.asarray(Image.open(io.BytesIO(pictures.read(f"x{scale}/img_00{i}_{kind}.png"))))
                for kind in ("LR", "HR")
            )
            for i in range(1, 6)
        ]


def score(path: Path, pairs: list[tuple[np.ndarray, np.ndarray]], scale: int) -> float:
    """Return the mean PSNR on luma in dB."""
    session, found = open_session(path), []
    for small, large in pairs:
        feed = np.ascontiguousarray((small / np.float32(255)).transpose(2, 0, 1)[None], np.float32)
        out = session.run(None, {"image": feed})[0][0].transpose(1, 2, 0)
        pixels = np.rint(out.clip(0, 1) * 255).astype(np.uint8)
        found.append(psnr(to_y(pixels), to_y(large), scale))
    return float(np.mean(found))


def prepare(network: str, weights: Path, data: Path, work: Path, tile: int) -> None:
    """Export one network into `work`, measure it on Set5 and compile it."""
    restorer = find_restorer(network, weights / OFFICIAL[network])
    atomic_write(work / network / "float32.onnx", restorer.path.read_bytes())
    about = {"scale": restorer.scale}
    _finish(work / network, "float32", about, data, tile)


def quantise(network: str, data: Path, work: Path, tile: int) -> None:
    """Quantise a prepared network, keeping as many layers in float as the loss demands, and do the same."""
    folder = work / network
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    scale = about["scale"]
    pairs = patches(data / "t91" / "t91.zip", scale, CALIBRATION + HELD_OUT, seed=0)
    held_out, used = pairs[:HELD_OUT], pairs[HELD_OUT:]
    calibration = np.stack([small for small, _ in used]).transpose(0, 3, 1, 2) / np.float32(255)
    report = quantize_within(
        folder / "float32.onnx",
        folder / "int8.onnx",
        calibration.astype(np.float32),
        lambda path: score(path, held_out, scale),
        MAX_DROP_DB,
        methods=("mse",),
    )
    about["float_layers"] = len(report.kept_float)
    _finish(folder, "int8", about, data, tile)


def _finish(folder: Path, precision: str, about: dict[str, Any], data: Path, tile: int) -> None:
    """Measure a file on Set5, write what is known, and compile it."""
    path = folder / f"{precision}.onnx"
    about[precision] = score(path, set5(data / "set5" / "set5.zip", about["scale"]), about["scale"])
    atomic_write_json(folder / "about.json", about)
    print(folder.name, about)
    try:
        compile_onnx(path, folder / precision, shapes={"image": [1, 3, tile, tile]})
    except FeatherweightError as error:
        logging.warning("%s is not compiled: %s", path, error)


def measure(network: str, work: Path, tile: int, runs: int, seconds: float) -> list[dict[str, Any]]:
    """Time every engine in turns on one tile and return the rows."""
    folder = work / network
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    image = np.random.default_rng(0).integers(0, 256, (tile, tile, 3), np.uint8)
    feed = {"image": np.ascontiguousarray(image.transpose(2, 0, 1)[None] / np.float32(255), np.float32)}
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for precision in ("float32", "int8"):
        if not (folder / f"{precision}.onnx").is_file():
            continue
        if (folder / precision).is_dir():
            jobs["featherweight", precision] = _job(Session(folder / precision).run, feed)
        jobs["onnxruntime", precision] = _job(open_session(folder / f"{precision}.onnx").run, feed)
        if peer := _openvino(folder / f"{precision}.onnx", tile):
            jobs["openvino", precision] = lambda peer=peer: peer(feed)
    scale = about["scale"]
    picture, size = Image.fromarray(image), (tile * scale, tile * scale)
    jobs["bicubic, Pillow", "uint8"] = lambda: picture.resize(size, Image.Resampling.BICUBIC)
    jobs["bicubic, featherweight", "uint8"] = lambda: imresize(image, scale)
    times = in_turns({str(key): job for key, job in jobs.items()}, runs, 1, seconds)
    megapixels = (tile * scale) ** 2 / 1e6
    return [
        {
            "network": network,
            "engine": key[0],
            "precision": key[1],
            "tile": tile,
            "scale": scale,
            "threads": 1,
            "s_per_output_mp": f"{latency.p50_ms / 1e3 / megapixels:.4f}",
            "set5_psnr_db": f"{about[key[1]]:.3f}" if key[1] in about else "",
            "float_layers": about["float_layers"] if key[1] == "int8" else "",
            **cells(latency),
            **provenance(("featherweight", "onnxruntime", "openvino", "pillow")),
        }
        for key, latency in zip(jobs, times.values(), strict=True)
    ]


def _job(run: Callable[..., object], feed: dict[str, np.ndarray]) -> Callable[[], object]:
    return lambda: run(None, feed)


def _openvino(path: Path, tile: int) -> Callable[[dict[str, np.ndarray]], object] | None:
    """Compile the file with OpenVINO for one thread; None where it is not installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([1, 3, tile, tile])
    hints = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", hints)
    return lambda feed: compiled(feed["image"])


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("prepare", "quantise", "time"))
    parser.add_argument("networks", nargs="*", default=list(OFFICIAL), help=f"of {', '.join(OFFICIAL)}")
    parser.add_argument("--weights", type=Path, help="folder of the official .pth files")
    parser.add_argument("--data", type=Path, help="folder that holds set5/set5.zip and t91/t91.zip")
    parser.add_argument("--work", type=Path, required=True, help="folder for what prepare makes")
    parser.add_argument("--tile", type=int, default=128, help="side of the image in pixels")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0, help="end the rounds after this time")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for network in options.networks:
        if options.step == "prepare":
            prepare(network, options.weights, options.data, options.work, options.tile)
            continue
        if options.step == "quantise":
            quantise(network, options.data, options.work, options.tile)
            continue
        rows = measure(network, options.work, options.tile, options.runs, options.seconds)
        path = RESULTS / f"{machine_id()}.csv"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        atomic_write(path, merge_rows(text, rows, KEY, COLUMNS))
        for row in rows:
            print(row["network"], row["engine"], row["precision"], row["s_per_output_mp"], "s/MP")


if __name__ == "__main__":
    main()
