"""Lightweight vision networks, from paper to device: build, train, shrink, measure and ship them.

The public names below load on first use, so that `import featherweight` costs nothing and never imports
torch.

>>> import featherweight
>>> featherweight.list_models("mobilenetv2_1*")
['mobilenetv2_100', 'mobilenetv2_130', 'mobilenetv2_140']
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "errors": (
        "BudgetError",
        "CheckpointError",
        "DataError",
        "FeatherweightError",
        "MissingExtraError",
        "UsageError",
    ),
    "cards": ("all_cards", "get_card"),
    "weights": ("load_official",),
    "registry": ("create_model", "list_models", "list_ops"),
    "ops.replace": ("replace_convs",),
    "data.bicubic": ("imresize",),
    "data.preprocess": ("Preprocess",),
    "data.sources": ("load_dataset",),
    "train.recipe": ("Recipe",),
    "train.loop": ("fit_model",),
    "shrink.fold": ("fold_batchnorm",),
    "shrink.quantize": ("quantize_onnx",),
    "export.onnx": ("export_onnx", "run_onnx"),
    "measure.count": ("count",),
    "measure.latency": ("measure_latency",),
    "workflows.fit": ("fit",),
    "workflows.train_sr": ("TrainSROptions", "train_sr"),
    "workflows.predict": ("predict",),
    "workflows.evaluate": ("evaluate",),
    "workflows.upscale": ("Upscaler", "upscale"),
    "workflows.evaluate_sr": ("evaluate_sr",),
    "workflows.reproduce": ("reproduce",),
}
"""Module (under `featherweight.`) -> the public names that it gives."""

_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use (PEP 562)."""
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(f"featherweight.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'featherweight' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("featherweight")
    except PackageNotFoundError:  # run from a source folder that was never installed
        return "0+unknown"
