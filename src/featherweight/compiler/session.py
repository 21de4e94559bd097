"""Run a compiled network from Python: the calls of onnxruntime's InferenceSession, on numpy arrays."""

from __future__ import annotations

import ctypes
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.compiler.build import LIBRARY
from featherweight.compiler.pages import ALIGNMENT, allocate
from featherweight.errors import DataError, UsageError


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and onnxruntime's type string of an input or output."""

    name: str
    shape: tuple[int, ...]
    type: str
    dtype: np.dtype


_ORT_TYPES = {"float32": "float", "float64": "double"}


class Session:
    """A loaded network with a context of its own. Not to be shared between threads; make one for each.

    Args:
        path: the folder that `compile_onnx` wrote, or the library in it.
        prefix: the names of the library's functions start with it.

    Raises:
        DataError: no compiled network there, or one that does not load.
    """

    def __init__(self, path: str | Path, prefix: str = "model") -> None:
        path = Path(path)
        library = path / LIBRARY if path.is_dir() else path
        if not library.is_file():
            raise DataError(f"No compiled network at {path}; expected a folder with {LIBRARY}.")
        self._library = _load(library)
        self._open(library.with_name(f"{prefix}.weights"), prefix)

    def _open(self, weights: Path, prefix: str) -> None:
        describe = getattr(self._library, f"{prefix}_description")
        describe.restype = ctypes.c_char_p
        self.description: dict[str, Any] = json.loads(describe())
        self._inputs = [_info(entry) for entry in self.description["inputs"]]
        self._outputs = [_info(entry) for entry in self.description["outputs"]]
        size = self.description["weights_bytes"]
        if size and (not weights.is_file() or weights.stat().st_size != size):
            raise DataError(f"{weights} is missing or not of {size} bytes. Compile the network again.")
        # The context in front, the weights behind it.
        front = -(-self.description["context_bytes"] // ALIGNMENT) * ALIGNMENT
        self._memory = allocate(front + size)
        if size:
            with weights.open("rb", buffering=0) as file:
                file.readinto(memoryview(self._memory)[front:])
        init = getattr(self._library, f"{prefix}_init")
        init.restype, init.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
        start = self._memory.ctypes.data
        self._context = ctypes.c_void_p(init(start, start + front))
        self._run = getattr(self._library, f"{prefix}_run")
        self._run_steps = getattr(self._library, f"{prefix}_run_steps")
        self._close = getattr(self._library, f"{prefix}_close")
        for function in (self._run, self._run_steps, self._close):
            function.restype = None
        self._input_pointers = _pointers([None] * len(self._inputs))
        self._output_pointers = _pointers([None] * len(self._outputs))

    def get_inputs(self) -> list[TensorInfo]:
        """Return the inputs in the order of the ONNX file."""
        return list(self._inputs)

    def get_outputs(self) -> list[TensorInfo]:
        """Return the outputs in the order of the ONNX file."""
        return list(self._outputs)

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Compute the outputs.

        Args:
            names: outputs to return, None for all.
            feeds: one array an input, of its exact shape and type.

        Raises:
            UsageError: an input is missing, unknown, or of another shape or type; an output is unknown.
        """
        arrays = self._arrays(feeds)
        outputs = [np.empty(info.shape, info.dtype) for info in self._outputs]
        # Behind a network the caches hold nothing of Python: every call made here costs microseconds.
        for index, array in enumerate(arrays):
            self._input_pointers[index] = _address(array)
        for index, array in enumerate(outputs):
            self._output_pointers[index] = _address(array)
        self._run(self._context, self._input_pointers, self._output_pointers)
        if names is None:
            return outputs
        index = {info.name: position for position, info in enumerate(self._outputs)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise UsageError(f"No output '{unknown[0]}'; the network has {', '.join(index)}.")
        return [outputs[index[name]] for name in names]

    def time_steps(self, feeds: Mapping[str, np.ndarray], repeats: int = 10) -> list[float]:
        """Return the least time of each step in seconds over some runs, on the calling thread."""
        import time

        arrays = _pointers(self._arrays(feeds))
        kept = [np.empty(info.shape, info.dtype) for info in self._outputs]
        outputs = _pointers(kept)
        steps = self.description["steps"]
        best = [float("inf")] * steps
        for _ in range(repeats):
            for index in range(steps):
                start = time.perf_counter()
                self._run_steps(self._context, arrays, outputs, index, index + 1)
                best[index] = min(best[index], time.perf_counter() - start)
        return best

    def _arrays(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = [feeds.get(info.name) for info in self._inputs]
        if len(feeds) == len(found) and all(map(_fits, found, self._inputs)):
            return found
        return self._checked(feeds)

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the inputs as arrays that the library can read."""
        unknown = set(feeds) - {info.name for info in self._inputs}
        if unknown:
            raise UsageError(f"No input '{unknown.pop()}'; the network has {self._names()}.")
        arrays = []
        for info in self._inputs:
            if info.name not in feeds:
                raise UsageError(f"Input '{info.name}' is missing; the network needs {self._names()}.")
            array = np.ascontiguousarray(feeds[info.name])
            if array.dtype != info.dtype or feeds[info.name].shape != info.shape:
                raise UsageError(
                    f"Input '{info.name}' is {array.dtype} {list(np.shape(feeds[info.name]))}; "
                    f"the network was compiled for {info.dtype} {list(info.shape)}."
                )
            arrays.append(array)
        return arrays

    def _names(self) -> str:
        return ", ".join(info.name for info in self._inputs) or "no inputs"

    def close(self) -> None:
        """End the network's threads; the session cannot run any more."""
        context, self._context = getattr(self, "_context", None), None
        if context:
            self._close(context)

    def __del__(self) -> None:
        self.close()


def _load(library: Path) -> ctypes.CDLL:
    """Load a library under a name of its own: for a known path the system returns what it loaded before."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / library.name
        try:
            shutil.copyfile(library, copy)
            return ctypes.CDLL(str(copy))
        except OSError as error:
            raise DataError(f"{library} does not load: {error}. Compile the network again.") from error


def _info(entry: dict[str, Any]) -> TensorInfo:
    dtype = np.dtype(entry["type"])
    return TensorInfo(
        entry["name"], tuple(entry["shape"]), f"tensor({_ORT_TYPES.get(dtype.name, dtype.name)})", dtype
    )


def _fits(array: np.ndarray | None, info: TensorInfo) -> bool:
    """Say whether an array can be read as it is."""
    return (
        type(array) is np.ndarray
        and array.dtype == info.dtype
        and array.shape == info.shape
        and array.flags.c_contiguous
    )


def _address(array: np.ndarray) -> int:
    """Return where an array's data lie, without the Python code behind `array.ctypes` where that works."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return array.ctypes.data


def _pointers(arrays: Sequence[np.ndarray | None]) -> Any:
    """Return the addresses of arrays as the library reads them, NULL for None."""
    addresses = [None if array is None else _address(array) for array in arrays]
    return (ctypes.c_void_p * max(len(arrays), 1))(*addresses)
