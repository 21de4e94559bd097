"""Compile an ONNX file and hold the result to onnxruntime's answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.compiler import Session
from featherweight.compiler.build import target_named
from featherweight.compiler.driver import compile_onnx, random_inputs
from featherweight.compiler.foreign import ForeignSession
from featherweight.errors import FeatherweightError, UsageError

MAX_RELATIVE_ERROR = 1e-4


def compile_and_check(
    model: Path,
    out: Path,
    *,
    target: str = "native",
    threads: int = 1,
    batch: int = 1,
    shapes: Sequence[str] = (),
    tune: bool = False,
    check: bool = False,
) -> dict[str, Any]:
    """Compile `model` into `out` and return the report.

    Args:
        model: the ONNX file.
        out: the folder for source, weights, library and report.
        target: as `featherweight.compiler.compile_onnx` takes it.
        threads: threads of the compiled network.
        batch: size of a free first dimension.
        shapes: `name=1,3,224,224` for inputs whose sizes the file leaves free.
        tune: time the candidate tiles of each layer.
        check: compare with onnxruntime on noise.

    Raises:
        FeatherweightError: the outputs differ by more than 1e-4 of the largest.
        UsageError: a shape cannot be read, or the target is to be checked and runs neither here nor emulated.
        MissingExtraError: the target's compiler or emulator is not installed.
        DataError: the file cannot be compiled.
    """
    session = compile_onnx(
        model, out, target, threads, tune, shapes=parse_shapes(shapes), batch=batch, measure=True
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if check:
        # A target of another machine is checked in its emulator.
        session = session or ForeignSession(out, target_named(target))
        report["max_relative_error"] = max_relative_error(session, model)
        if not report["max_relative_error"] <= MAX_RELATIVE_ERROR:
            raise FeatherweightError(
                f"The compiled network differs from onnxruntime by {report['max_relative_error']:.2g} of the "
                f"largest output, limit {MAX_RELATIVE_ERROR:g}."
            )
    return report


def max_relative_error(session: Session, model: Path) -> float:
    """Return the largest difference from onnxruntime over the largest output, on seeded noise."""
    from featherweight.export.onnx import open_session

    feeds = random_inputs(session)
    worst = 0.0
    for got, expected in zip(session.run(None, feeds), open_session(model).run(None, feeds), strict=True):
        if expected.size:
            gap = np.abs(got.astype(np.float64) - expected).max()
            worst = max(worst, float(gap) / max(float(np.abs(expected).max()), 1e-12))
    return worst if np.isfinite(worst) else float("inf")


def parse_shapes(words: Sequence[str]) -> dict[str, list[int]]:
    """Return input shapes from the words of the command line.

    Raises:
        UsageError: a word is not of the form `name=1,3,224,224`.

    >>> parse_shapes(["image=1,3,32,32"])
    {'image': [1, 3, 32, 32]}
    """
    shapes = {}
    for word in words:
        name, _, sizes = word.rpartition("=")
        try:
            shapes[name] = [int(size) for size in sizes.split(",")]
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--shape {word}: expected NAME=1,3,224,224.")
    return shapes
