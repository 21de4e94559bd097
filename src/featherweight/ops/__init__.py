"""Published operators that take a convolution's place, one module each; the names below load on first use.

>>> from featherweight.ops import PHConv2d
>>> PHConv2d(6, 9, 3, n=3).out_channels
9
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "fdconv": ("FDConv2d", "FDLinear"),
    "flashbutterfly": ("LongConv1d", "LongConvMixer", "LongConvNet"),
    "flashfftconv": ("FlashFFTConv1d", "fft_conv"),
    "hyperzzw": ("HyperZZW2d",),
    "phnn": ("PHConv1d", "PHConv2d", "PHConv3d", "PHLinear"),
    "replace": ("replace_convs",),
    "tvconv": ("TVConv2d",),
    "weighted_conv": ("WeightedConv1d", "WeightedConv2d", "WeightedConv3d"),
}
"""Module -> the names that it gives."""

_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import the module of a name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'featherweight.ops' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"featherweight.ops.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
