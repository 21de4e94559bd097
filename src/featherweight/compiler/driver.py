"""`compile_onnx`: the whole way from an ONNX file to a folder with C source, weights, library and report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from featherweight.compiler import (  # noqa: F401  (the emitters register themselves)
    emit_block,
    emit_conv,
    emit_elementwise,
    emit_index,
    emit_int8,
    emit_int8_pixel,
    emit_matmul,
    emit_norm,
    emit_pixel,
    emit_pixel_conv,
    emit_planar,
    emit_pool,
    emit_product,
    emit_reduce,
    emit_resize,
    emit_rows,
    emit_shape,
    emit_signal,
)
from featherweight.compiler.build import (
    Target,
    build_library,
    runs_on_this_machine,
    target_named,
    vector_floats,
    write_whole,
)
from featherweight.compiler.examples import example_files
from featherweight.compiler.graph import Graph
from featherweight.compiler.lower import EMITTERS, Lowering, check_supported
from featherweight.compiler.memory import plan_memory
from featherweight.compiler.passes import run_passes
from featherweight.compiler.peak import measure_peak
from featherweight.compiler.program import Program
from featherweight.compiler.reader import Shapes, read_model
from featherweight.compiler.report import layer_report
from featherweight.compiler.session import Session
from featherweight.compiler.source import describe, write_header, write_source
from featherweight.compiler.tiles import Tiles
from featherweight.compiler.tune import tune as tune_tiles
from featherweight.errors import DataError, UsageError, WriteError

MAX_THREADS = 64
MAX_MESSAGE = 500
"""Characters of an error: names in a file can be of any length."""


@dataclass(frozen=True)
class Compiled:
    """Everything that one network becomes before the C compiler sees it."""

    graph: Graph
    program: Program
    description: dict[str, Any]
    header: str
    source: str
    weights: bytes


def generate(
    source: str | Path | onnx.ModelProto,
    target: Target,
    *,
    shapes: Shapes | None = None,
    batch: int = 1,
    threads: int = 1,
    prefix: str = "model",
    tiles: Tiles | None = None,
) -> Compiled:
    """Read a network and write its C in memory; no file is touched.

    Raises:
        DataError: the file is unreadable, unsafe or holds something that is not supported.
    """
    vector = vector_floats(target)
    try:
        graph = read_model(source, shapes, batch, EMITTERS)
        check_supported(graph)
        tiles = tiles or Tiles()
        layout = run_passes(graph, vector, tiles.alternatives)
        program = Lowering(graph, layout, vector, threads, tiles).run()
    except DataError as error:
        raise DataError(_one_line(str(error))) from error
    arena = plan_memory(program)
    description = describe(graph, program, arena, {"target": target.name, "threads": threads})
    return Compiled(
        graph,
        program,
        description,
        write_header(description, prefix),
        write_source(program, description, prefix, threads),
        bytes(program.weights),
    )


def _one_line(message: str) -> str:
    """Return a message that names from the file cannot break into lines or draw out."""
    clean = "".join(char if char.isprintable() else "?" for char in message)
    return clean if len(clean) <= MAX_MESSAGE else clean[:MAX_MESSAGE] + "..."


def compile_onnx(
    path: str | Path,
    out_dir: str | Path,
    target: str = "native",
    threads: int = 1,
    tune: bool = False,
    *,
    shapes: Shapes | None = None,
    batch: int = 1,
    measure: bool = False,
) -> Session | None:
    """Compile an ONNX file into `out_dir`: model.c, model.h, model.weights, libmodel.so, main.c, report.json.

    For wasm32 the library is model.wasm, with model.mjs to load it and main.mjs as the example.

    Args:
        path: the ONNX file.
        out_dir: the folder; made where it is missing, files in it are replaced.
        target: native, x86-64-v3, x86-64-v4, aarch64, wasm32 or generic-c.
        threads: threads of the generated code.
        tune: time the candidate tiles of each layer on this machine and keep the best.
        shapes: whole shapes of inputs whose sizes the file leaves free.
        batch: size of a free first dimension.
        measure: time every layer for the report.

    Returns:
        The loaded network, or None for a target that cannot run here.

    Raises:
        DataError: the file is unreadable, unsafe or holds what is not supported; nothing is written.
        MissingExtraError: no C compiler for the target.
        UsageError: a batch below one, or a number of threads that the target cannot have.
    """
    if not 1 <= threads <= MAX_THREADS or batch < 1:
        raise UsageError(
            f"threads={threads}, batch={batch}: expected 1 to {MAX_THREADS} threads and a batch."
        )
    machine = target_named(target)
    if threads > 1 and not machine.threads:
        raise UsageError(f"threads={threads}: target {target} has no threads; expected 1.")
    runs = runs_on_this_machine(machine)
    start = time.perf_counter()

    def make(tiles: Tiles | None = None) -> Compiled:
        return generate(path, machine, shapes=shapes, batch=batch, threads=threads, tiles=tiles)

    compiled = make()
    if tune and runs:
        compiled = make(tune_tiles(make, partial(write_files, threads=threads), machine, threads))
    generated = time.perf_counter()
    out = Path(out_dir)
    write_files(compiled, out, threads)
    cached = build_library([out / "model.c"], out / machine.library, machine, threads)
    built = time.perf_counter()
    session = Session(out) if runs else None
    times = session.time_steps(random_inputs(session)) if session and measure else None
    peak = measure_peak(machine) if times else None
    report = layer_report(compiled.program, compiled.description, times, peak)
    report["seconds"] = {"generate": generated - start, "build": built - generated, "cached": cached}
    write_whole(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return session


def write_files(compiled: Compiled, out: Path, threads: int = 1, prefix: str = "model") -> None:
    """Write source, header, weights and the example program into a folder.

    Raises:
        WriteError: the folder cannot be written.
    """
    texts = {
        f"{prefix}.c": compiled.source,
        f"{prefix}.h": compiled.header,
        **example_files(compiled.description, prefix, threads, compiled.description["target"] == "wasm32"),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(out / name, text.encode("ascii"))
        write_whole(out / f"{prefix}.weights", compiled.weights)
    except OSError as error:
        raise WriteError(
            f"Cannot write to {out}: {error.strerror or error}. Choose another folder."
        ) from error


def random_inputs(session: Session, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded noise for every input: normal for floats, small counts for integers."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for info in session.get_inputs():
        if info.dtype.kind == "f":
            feeds[info.name] = rng.standard_normal(info.shape).astype(info.dtype)
        else:
            feeds[info.name] = rng.integers(0, 2, info.shape).astype(info.dtype)
    return feeds
