"""Measure the latency table that slimming cuts along: every block at every width, on this machine.

Each piece is exported to ONNX, with its batch norms folded, and timed with onnxruntime. A block that keeps
the shape of its input is timed as the difference between one copy and several in a row, taken in turns: the
cost of starting a run and of the first change of memory layout falls out. What changes the shape is timed
alone, so its figure holds that start; it is the same for every width and so never decides a step.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ..errors import DataError
from ..export.onnx import export_onnx
from ..files import atomic_write_json
from ..measure.latency import compare, measure_latency
from ..measure.machine import machine, machine_id
from ..train.slimming import LatencyTable, Piece

InputSize = tuple[int, int, int]
"""Channels, height and width of one input, in pixels."""

Build = Callable[[Piece], tuple[nn.Module, InputSize]]
"""Gives a piece as a module, and the size of its input."""


def build_latency_table(
    build: Build,
    pieces: Iterable[Piece],
    *,
    head: tuple[nn.Module, InputSize] | None = None,
    threads: int = 1,
    runs: int = 50,
    copies: int = 4,
    progress: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Time pieces on this machine's processor.

    Args:
        build: makes a piece, with random weights.
        pieces: what to time, see `slimming.possible_pieces`.
        head: the end of the network and the size of its input; what every design pays.
        threads: threads onnxruntime may use.
        runs: timed runs of each piece.
        copies: further copies of a block in the longer row.
        progress: gets a line for each piece.
    """
    with tempfile.TemporaryDirectory() as folder:
        entries = {}
        for piece in pieces:
            modules = [build(piece) for _ in range(copies + 1)]
            chain, size = [module for module, _ in modules], modules[0][1]
            entries[piece] = _time_piece(chain, size, Path(folder), threads, runs)
            if progress is not None:
                progress(f"{piece.kind} of stage {piece.stage} at {piece.width}: {entries[piece]:.4f} ms")
        fixed_ms = 0.0 if head is None else _time_alone(*head, Path(folder), threads, runs)
    return LatencyTable(entries, fixed_ms)


def save_latency_table(table: LatencyTable, path: str | Path, threads: int = 1) -> None:
    """Write a table as JSON, with the machine that it holds for."""
    rows = [{**piece._asdict(), "latency_ms": value} for piece, value in table.entries.items()]
    content = {
        "machine_id": machine_id(),
        "machine": machine(),
        "threads": threads,
        "fixed_ms": table.fixed_ms,
        "pieces": rows,
    }
    atomic_write_json(Path(path), content)


def load_latency_table(path: str | Path, *, any_machine: bool = False) -> LatencyTable:
    """Read a table back.

    Args:
        path: a file of `save_latency_table`.
        any_machine: take a table that was measured on another machine.

    Raises:
        DataError: the file is missing or damaged, or the table is another machine's.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = {
            Piece(*(row[field] for field in Piece._fields)): float(row["latency_ms"])
            for row in content["pieces"]
        }
        owner, fixed_ms = content["machine_id"], float(content["fixed_ms"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no latency table: {error!r}. Measure one on this machine.") from error
    if owner != machine_id() and not any_machine:
        raise DataError(
            f"{path} was measured on machine {owner}, this is {machine_id()}: latencies of one say little "
            "about the other. Measure again, or pass any_machine=True."
        )
    return LatencyTable(entries, fixed_ms)


def _time_piece(chain: list[nn.Module], size: InputSize, folder: Path, threads: int, runs: int) -> float:
    with torch.no_grad():
        shape = chain[0].eval()(torch.zeros(1, *size)).shape
    if tuple(shape[1:]) != size:
        return _time_alone(chain[0], size, folder, threads, runs)
    one, many = folder / "one.onnx", folder / "many.onnx"
    export_onnx(chain[0], one, size, check=False)
    export_onnx(nn.Sequential(*chain), many, size, check=False)
    short, long = (found.p50_ms for found in compare([one, many], threads, runs).latencies)
    return max(0.0, long - short) / (len(chain) - 1)


def _time_alone(module: nn.Module, size: InputSize, folder: Path, threads: int, runs: int) -> float:
    path = folder / "alone.onnx"
    export_onnx(module.eval(), path, size, check=False)
    return measure_latency(path, threads, runs).p50_ms
