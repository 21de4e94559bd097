"""Measure the peak memory of running an ONNX file, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from featherweight.errors import DataError, FeatherweightError

# Runs in the child, which imports onnxruntime and numpy only. The high-water mark after the imports is the
# baseline: what is counted is the model, its prepared weights and its activations, not the engine's code.
CHILD = """
import sys
import numpy, onnxruntime
def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
options.log_severity_level = 3
before = peak()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {v.name: numpy.zeros([d if isinstance(d, int) else 1 for d in v.shape], numpy.float32)
        for v in session.get_inputs()}
for _ in range(3):
    session.run(None, feed)
print(peak() - before)
"""


def peak_memory_bytes(onnx_path: str | Path, threads: int = 1) -> int:
    """Return by how many bytes loading and running the file (batch 1) raises a process's peak memory.

    Raises:
        DataError: the file is missing.
        FeatherweightError: the child process failed, as with a file that onnxruntime refuses.
    """
    path = Path(onnx_path)
    if not path.is_file():
        raise DataError(f"No ONNX file at {path} to measure.")
    command = [sys.executable, "-c", CHILD, str(path), str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise FeatherweightError(f"Measuring the memory of {path} failed: {reason}")
    return int(result.stdout)
