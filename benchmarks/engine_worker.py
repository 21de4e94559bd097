"""One engine in a process of its own, for `engines.py`: loads a network, runs once for every line it reads.

    python engine_worker.py '{"engine": "litert", "network": "mobilenetv2_100", "form": "float32", ...}'

The first line that it writes is "ready", every other the milliseconds of one run. LiteRT (whose CPU kernels
are XNNPACK's) has needs of its own and is best installed apart: an environment with featherweight,
ai-edge-litert and litert-torch, whose Python `engines.py` is told by `--litert`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}


def with_litert(job: dict[str, Any], x: np.ndarray) -> Callable[[], np.ndarray]:
    """Convert the module once, and run it on XNNPACK."""
    import torch
    from ai_edge_litert.interpreter import Interpreter

    from engine_files import make_module

    path = Path(job["file"]).with_suffix(".tflite")
    if not path.exists():
        import litert_torch

        litert_torch.convert(make_module(job["network"], job["form"]), (torch.from_numpy(x),)).export(
            str(path)
        )
    interpreter = Interpreter(str(path), num_threads=job["threads"])
    interpreter.allocate_tensors()
    (entry,), (result, *_) = interpreter.get_input_details(), interpreter.get_output_details()

    def run() -> np.ndarray:
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return run


def with_torch(job: dict[str, Any], x: np.ndarray) -> Callable[[], np.ndarray]:
    """Run the module itself, channels last; torch.compile runs it through inductor first."""
    import torch

    from engine_files import make_module

    torch.set_num_threads(job["threads"])
    module = make_module(job["network"], job["form"]).to(memory_format=torch.channels_last)
    images = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    module = torch.compile(module) if job["engine"] == "torch.compile" else module

    def run() -> np.ndarray:
        with torch.inference_mode():
            return module(images).numpy()

    return run


ENGINES = {"litert": with_litert, "torch": with_torch, "torch.compile": with_torch}


def main() -> None:
    """Load, report, and serve until the input ends."""
    job = json.loads(sys.argv[1])
    # Libraries chat on standard output; the protocol keeps it to itself.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    x = np.load(job["input"])
    run = ENGINES[job["engine"]](job, x)
    run()
    np.save(job["answer"], run())
    print("ready", file=channel, flush=True)
    for line in sys.stdin:
        clock = CLOCKS[line.strip()]
        start = clock()
        run()
        print((clock() - start) / 1e6, file=channel, flush=True)


if __name__ == "__main__":
    main()
