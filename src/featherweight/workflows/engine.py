"""The compiled engine of a run: each exported file as a C source and a library, beside the ONNX files."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.compiler import compile_onnx
from featherweight.errors import FeatherweightError
from featherweight.export.onnx import open_session
from featherweight.measure.latency import Latency, summarize, time_jobs
from featherweight.report.content import VariantResult
from featherweight.workflows.delivery import FILES
from featherweight.workflows.predict import COMPILED_FOLDER

log = logging.getLogger("featherweight")

_RUNS, _WARMUP = 200, 10
_IMAGES = 256
_AGREEING = 0.99


@dataclass(frozen=True)
class Engine:
    """A compiled variant beside onnxruntime: latency of one image on one thread, share of equal answers."""

    folder: str
    compiled: Latency
    onnxruntime: Latency
    agreement: float
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values of `metrics.json`; the size is that of the library and its weights."""
        return {
            "folder": self.folder,
            "latency_ms": _points(self.compiled),
            "onnxruntime_latency_ms": _points(self.onnxruntime),
            "agreement": self.agreement,
            "size_bytes": self.size_bytes,
        }


def _points(latency: Latency) -> dict[str, float]:
    return {"p50": latency.p50_ms, "p95": latency.p95_ms, "threads": latency.threads}


def add_engines(
    run_dir: Path, variants: Mapping[str, VariantResult], images: np.ndarray
) -> tuple[dict[str, VariantResult], list[str]]:
    """Compile every exported file and time it in turns with onnxruntime.

    Args:
        run_dir: the run folder.
        variants: what was measured of each file of `delivery.FILES`.
        images: preprocessed images (N, C, H, W) on which both engines must agree.

    Returns:
        The variants with their engines, and notes on what could not be compiled: no C compiler, an operator
        that the compiler does not know, or answers that differ on more than one image in a hundred.
    """
    added, notes = dict(variants), []
    for variant in variants:
        file, folder = FILES[variant], f"{COMPILED_FOLDER}/{variant}"
        try:
            engine = _compile(run_dir / file, run_dir / folder, folder, images[:_IMAGES])
        except FeatherweightError as error:
            notes.append(f"{file} is not compiled: {error}")
            continue
        if engine.agreement < _AGREEING:
            notes.append(
                f"Compiled, {file} answers as in onnxruntime on {engine.agreement:.1%} of images only."
            )
            continue
        added[variant] = dataclasses.replace(variants[variant], engine=engine.to_dict())
        log.info(
            *("%s compiled: %.3f ms, onnxruntime in turns with it: %.3f ms", file),
            *(engine.compiled.p50_ms, engine.onnxruntime.p50_ms),
        )
    for note in notes:
        log.warning(note)
    return added, notes


def _compile(path: Path, out: Path, folder: str, images: np.ndarray) -> Engine:
    session, peer = compile_onnx(path, out), open_session(path)
    name = session.get_inputs()[0].name
    runs = {"compiled": session.run, "onnxruntime": peer.run}
    answers = {
        engine: [int(run(None, {name: image[None]})[0].argmax()) for image in images]
        for engine, run in runs.items()
    }
    jobs = [functools.partial(run, None, {name: images[:1]}) for run in runs.values()]
    times = dict(zip(runs, time_jobs(jobs, _RUNS, _WARMUP), strict=True))
    session.close()
    same = np.mean(np.array(answers["compiled"]) == np.array(answers["onnxruntime"]))
    size = sum((out / part).stat().st_size for part in ("libmodel.so", "model.weights"))
    latencies = {engine: summarize(row, 1) for engine, row in times.items()}
    return Engine(folder, latencies["compiled"], latencies["onnxruntime"], float(same), size)
