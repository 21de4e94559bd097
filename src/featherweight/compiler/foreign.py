"""Run a network that was compiled for another machine: aarch64 under qemu-user, wasm32 under Node."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from featherweight.compiler.build import COMMON, Target, call_compiler, find_compiler
from featherweight.compiler.session import Session, _info
from featherweight.errors import FeatherweightError, MissingExtraError, UsageError

RUN_SECONDS = 900
EMULATORS = {"aarch64": ("qemu-aarch64", "qemu-user"), "wasm32": ("node", "nodejs")}
"""Program and package that run each foreign target."""


class ForeignSession(Session):
    """A compiled network that runs in an emulator: the calls of `Session`, slow, to check answers.

    Args:
        folder: what `compile_onnx` wrote.
        target: the machine it was compiled for.

    Raises:
        UsageError: no emulator is known for the target.
        MissingExtraError: the emulator is not installed; the message names the package.
        FeatherweightError: the example program does not compile.
    """

    def __init__(self, folder: str | Path, target: Target) -> None:
        if target.name not in EMULATORS:
            raise UsageError(f"Target {target.name} does not run on this machine, and no emulator is known.")
        program, package = EMULATORS[target.name]
        emulator = shutil.which(program)
        if emulator is None:
            raise MissingExtraError(
                f"Running target {target.name} here needs {program}. Install it: apt install {package}"
            )
        self.folder = Path(folder).resolve()
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        self._inputs = [_info(entry) for entry in report["inputs"]]
        self._outputs = [_info(entry) for entry in report["outputs"]]
        self._place = tempfile.TemporaryDirectory()
        if target.name == "wasm32":
            self._command = [emulator, str(self.folder / "main.mjs")]
        else:
            binary = Path(self._place.name) / "main"
            self._build(target, binary, report["threads"])
            self._command = [emulator, str(binary), str(self.folder / "model.weights")]

    def _build(self, target: Target, binary: Path, threads: int) -> None:
        sources = [str(self.folder / name) for name in ("main.c", "model.c")]
        pthread = ["-pthread"] if threads > 1 else []
        flags = [*COMMON, *target.flags, *pthread, "-static", "-o", str(binary)]
        call_compiler([find_compiler(target), *flags, *sources, *target.libraries], target)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the outputs; arguments and errors are those of `Session.run`."""
        arrays = self._arrays(feeds)
        wanted = [info.name for info in self._outputs] if names is None else list(names)
        place = Path(self._place.name)
        files = [place / f"input_{index}.bin" for index in range(len(arrays))]
        for file, array in zip(files, arrays, strict=True):
            file.write_bytes(array.tobytes())
        self._execute([*self._command, *map(str, files)])
        results = {
            info.name: np.frombuffer((place / f"output_{index}.bin").read_bytes(), info.dtype).reshape(
                info.shape
            )
            for index, info in enumerate(self._outputs)
        }
        unknown = [name for name in wanted if name not in results]
        if unknown:
            raise UsageError(f"No output '{unknown[0]}'; the network has {', '.join(results)}.")
        return [results[name] for name in wanted]

    def _execute(self, command: list[str]) -> None:
        try:
            done = subprocess.run(
                command,
                cwd=self._place.name,
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise FeatherweightError(f"{command[0]} did not finish within {RUN_SECONDS} s.") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FeatherweightError(f"{command[0]} failed with exit code {done.returncode}: {last}")

    def close(self) -> None:
        """Remove the program that was built to run the network."""
        self._place.cleanup()
