"""Look at what is installed, and say what does not work together. Imports nothing heavy into this process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

OPTIONAL = {
    "timm": ("timm",),
    "hub": ("huggingface_hub",),
    "openvino": ("openvino",),
    "dev": ("pytest", "pytest-timeout", "ruff"),
}
"""Extra -> the packages it brings, for a source folder that was never installed."""

_FEATURES = [
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
]
_PROBE = "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"


def examine(quick: bool = False) -> dict[str, Any]:
    """Return packages, processor, optional parts and problems.

    Args:
        quick: read versions only; do not load torch and torchvision in a child process.
    """
    needed = _requirements()
    packages = [_package(name, bound) for name, (bound, extra) in needed.items() if not extra]
    problems = [f"{p['name']} {p['version'] or ''}: {p['state']}" for p in packages if p["state"] != "ok"]
    problems += check_pair(_version("torch"), _version("torchvision"))
    if not quick and not any("torch" in problem for problem in problems):
        problems += _probe()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "packages": packages,
        "extras": _extras(needed),
        "problems": problems,
    }


def check_pair(torch: str | None, torchvision: str | None) -> list[str]:
    """Return what is wrong with a pair of torch and torchvision versions.

    Each torchvision is compiled for one torch (2.n goes with 0.(n + 15)) and for one build of it.

    >>> check_pair("2.12.1+cpu", "0.27.1+cpu")
    []
    >>> check_pair("2.13.0", "0.27.1")
    ['torch 2.13.0 needs torchvision 0.28, found 0.27.1: install the pair together']
    """
    if not torch or not torchvision:
        return []
    (major, minor), (_, seen) = _numbers(torch), _numbers(torchvision)
    if major == 2 and seen != minor + 15:
        return [
            f"torch {torch} needs torchvision 0.{minor + 15}, found {torchvision}: install the pair together"
        ]
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if (builds[0] == "cpu") != (builds[1] == "cpu") and "cpu" in builds:
        return [
            f"torch {torch} and torchvision {torchvision} are different builds: "
            "install both from the same index, or operators such as nms are missing"
        ]
    return []


def cpu() -> dict[str, Any]:
    """Return the processor's name, its logical cores and the instruction sets that matter for inference."""
    model, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace")
        name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        model = name.group(1).strip() if name else model
        flags = set(found.group(1).split()) if found else flags
    return {
        "model": model,
        "cores": os.cpu_count(),
        "features": [feature for feature in _FEATURES if feature in flags],
    }


def _requirements() -> dict[str, tuple[str, str]]:
    """Return package -> (lower bound, extra); the extra is empty for what is always needed."""
    try:
        lines = importlib.metadata.requires("featherweight") or []
    except importlib.metadata.PackageNotFoundError:
        lines = _pyproject_lines()
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        match = re.match(
            r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9.]+))?.*?(?:extra\s*==\s*['\"](\w+)['\"])?$", line
        )
        if match and match.group(1) not in found:
            found[match.group(1)] = (match.group(2) or "", match.group(3) or "")
    return found


def _pyproject_lines() -> list[str]:
    import tomllib

    path = Path(__file__).resolve().parents[3] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    return [
        *project["dependencies"],
        *(f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines),
    ]


def _package(name: str, bound: str) -> dict[str, Any]:
    version = _version(name)
    if version is None:
        state = "missing"
    elif bound and _numbers(version, 3) < _numbers(bound, 3):
        state = f"too old, needs {bound}"
    else:
        state = "ok"
    return {"name": name, "version": version, "needed": f">={bound}" if bound else "", "state": state}


def _extras(needed: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    rows = []
    for extra, fallback in OPTIONAL.items():
        names = [name for name, (_, group) in needed.items() if group == extra] or list(fallback)
        absent = [name for name in names if _version(name) is None]
        rows.append(
            {
                "name": extra,
                "packages": {name: _version(name) for name in names},
                "state": f"missing: {', '.join(absent)}" if absent else "present",
                "install": f"pip install 'featherweight[{extra}]'",
            }
        )
    return rows


def _probe() -> list[str]:
    """Load torch with torchvision's compiled operators in a child process."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return ["torch and torchvision did not load within 120 s"]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [f"torch and torchvision do not load together: {last}"]
    return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str, count: int = 2) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
    return tuple([*numbers, 0, 0, 0][:count])
