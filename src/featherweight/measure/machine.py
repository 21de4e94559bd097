"""Describe the machine that a figure was measured on."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "onnx", "onnxruntime", "torch", "torchvision", "featherweight")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    """Return the vector and matrix instructions that decide how fast int8 arithmetic runs."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "asimddp",
        "i8mm",
    )
    flags = set(info.read_text(errors="replace").split())
    return [name for name in wanted if name in flags]


def _cores() -> int:
    """Return how many cores this process may use, which a container often limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "features": _cpu_features(),
        "cores": _cores(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def machine() -> dict[str, Any]:
    """Return processor, vector instructions, usable cores, system and versions, ready for JSON.

    >>> machine()["cores"] >= 1
    True
    """
    return json.loads(json.dumps(_machine()))


def machine_id() -> str:
    """Return a short name of processor, cores and system: equal names mean comparable latencies.

    The host's name does not enter, so a published figure does not tell where it was measured.
    """
    parts = [_machine()[key] for key in ("cpu", "features", "cores", "architecture")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
