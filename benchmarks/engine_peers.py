"""The engines that `engines.py` times, each behind the same two things: its answer, and one timed turn."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from engine_files import File
from featherweight.compiler import compile_onnx
from featherweight.measure.latency import CLOCKS

log = logging.getLogger("featherweight")

OURS = "featherweight"
HERE = Path(__file__).parent
LOAD_SECONDS = 900
"""Conversion by LiteRT and compilation by inductor take a minute or more."""


@dataclass(frozen=True)
class Task:
    """One file to time: its input's name and value, the number of threads, a folder to work in."""

    file: File
    name: str
    x: np.ndarray
    threads: int
    folder: Path
    tune: bool = False
    litert: str = ""


class Engine:
    """An engine in this process: `run` computes one image and returns the first output."""

    def __init__(self, run: Callable[[], np.ndarray]) -> None:
        self._run = run
        self.answer = np.array(run())

    def turn(self, clock: str) -> float:
        """Run once and return the milliseconds."""
        start = CLOCKS[clock]()
        self._run()
        return (CLOCKS[clock]() - start) / 1e6

    def close(self) -> None:
        """Free nothing: the engine ends with its last reference."""


class Worker:
    """An engine in a process of its own, which takes turns with the others.

    Raises:
        RuntimeError: the process ended before it was ready; its last line is told.
    """

    def __init__(self, engine: str, task: Task, python: str = sys.executable) -> None:
        answer, given = task.folder / f"{engine}.npy", task.folder / "input.npy"
        np.save(given, task.x)
        job = {
            "engine": engine,
            "network": task.file.network,
            "form": task.file.form,
            "file": str(task.file.path),
            "threads": task.threads,
            "input": str(given),
            "answer": str(answer),
        }
        self._log = (task.folder / f"{engine}.log").open("w+")
        self._process = subprocess.Popen(
            [python, str(HERE / "engine_worker.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=HERE,
        )
        if self._process.stdout.readline().strip() != "ready":
            self._process.wait(LOAD_SECONDS)
            self._log.seek(0)
            lines = self._log.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "it ended without a word")
        self.answer = np.load(answer)

    def turn(self, clock: str) -> float:
        """Have the process run once and return the milliseconds that it measured."""
        self._process.stdin.write(f"{clock}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._log.close()


def with_ours(task: Task) -> Engine:
    """Compile with our compiler."""
    out = task.folder / "compiled"
    session = compile_onnx(task.file.path, out, threads=task.threads, tune=task.tune)
    return Engine(lambda: session.run(None, {task.name: task.x})[0])


def with_onnxruntime(task: Task) -> Engine:
    """Load into onnxruntime with all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = task.threads, 3
    session = onnxruntime.InferenceSession(str(task.file.path), options, providers=["CPUExecutionProvider"])
    return Engine(lambda: session.run(None, {task.name: task.x})[0])


def with_openvino(task: Task) -> Engine:
    """Load into OpenVINO for the least latency, in the file's own precision."""
    import openvino

    core = openvino.Core()
    model = core.read_model(task.file.path)
    model.reshape({task.name: task.x.shape})
    settings = {"INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return Engine(lambda: request.infer({task.name: task.x}, share_inputs=True, share_outputs=True)[0])


def open_engines(task: Task, wanted: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the engines of one file.

    Args:
        task: the file.
        wanted: engines beside ours and onnxruntime.

    Returns:
        The engines, and for each that was wanted and is absent the reason.
    """
    engines: dict[str, Any] = {"onnxruntime": with_onnxruntime(task), OURS: with_ours(task)}
    absent: dict[str, str] = {}
    if "openvino" in wanted:
        if find_spec("openvino"):
            engines["openvino"] = with_openvino(task)
        else:
            absent["openvino"] = "not installed (pip install featherweight[openvino])"
    python = task.litert or (sys.executable if find_spec("ai_edge_litert") else "")
    for engine in sorted(wanted - {"openvino"}):
        if task.file.form in ("int8", "file"):
            absent[engine] = "takes networks by name in float32 only"
        elif engine == "litert" and not python:
            absent[engine] = "no Python with ai-edge-litert and litert-torch (--litert)"
        else:
            try:
                engines[engine] = Worker(engine, task, python if engine == "litert" else sys.executable)
            except RuntimeError as error:
                absent[engine] = f"failed: {str(error)[:200]}"
    for engine, reason in absent.items():
        log.warning("%s %s: %s is absent: %s", task.file.network, task.file.form, engine, reason)
    return engines, absent
