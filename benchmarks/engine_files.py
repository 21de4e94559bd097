"""The networks that `engines.py` times, as modules and as ONNX files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMS = ("float32", "int8", "sparse80", "sparse90")
NETWORKS = (
    *("mobilenetv2_100", "mobilenetv2_035", "ghostnetv2_100", "shufflenetv2_100", "inceptionnext_atto"),
    *("timm/efficientnet_b0", "timm/mobilenetv4_conv_small", "timm/fastvit_t8", "timm/repvit_m0_9"),
    "imdn_x2",
)
SPARSE = ("mobilenetv2_100",)
"""Networks that are also timed with most 1x1 weights zero."""

SHAPES = {"imdn_x2": (3, 128, 128)}
"""(C, H, W) of networks that do not tell."""

CALIBRATION_IMAGES = 8


@dataclass(frozen=True)
class File:
    """One ONNX file of a network, and the name and form that its module is built from."""

    network: str
    form: str
    path: Path


def input_shape(model: object, name: str) -> tuple[int, ...]:
    """Return (C, H, W) of a network."""
    config = getattr(model, "default_cfg", {})
    return SHAPES.get(name) or tuple(config.get("input_size", (3, 224, 224)))


def make_module(name: str, form: str) -> Any:
    """Return a registered network with seeded weights, fused; `sparse90` zeroes 90 % of each 1x1 layer.

    Raises:
        UsageError: the name is unknown.
    """
    import torch

    from featherweight.registry import create_model

    torch.manual_seed(0)
    model = create_model(name).eval()
    if hasattr(model, "fuse"):
        model.fuse()
    if form.startswith("sparse"):
        share = int(form.removeprefix("sparse")) / 100
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
                sizes = module.weight.data.abs().flatten()
                least = sizes.kthvalue(max(1, round(share * sizes.numel()))).values
                module.weight.data *= module.weight.data.abs() > least
    return model


def make_files(name: str, folder: Path, forms: tuple[str, ...] = FORMS) -> list[File]:
    """Return the files of a network: a path as it is, else one of each form; kept ones are used again.

    Raises:
        UsageError: the name is unknown.
        DataError: the file cannot be read.
    """
    if name.endswith(".onnx"):
        return [File(Path(name).stem, "file", Path(name))]
    skipped = {form for form in FORMS if form.startswith("sparse") and name not in SPARSE}
    # A restoration network's peers have no int8 form of the same file.
    skipped |= {"int8"} if name in SHAPES else set()
    wanted = [form for form in forms if form not in skipped]
    files = [File(name, form, folder / f"{name.replace('/', '_')}.{form}.onnx") for form in wanted]
    for file in files:
        if not file.path.exists():
            _write(file)
    return files


def _write(file: File) -> None:
    from featherweight.export.onnx import export_onnx
    from featherweight.shrink.quantize import quantize_onnx

    model = make_module(file.network, file.form)
    shape = input_shape(model, file.network)
    source = file.path.with_suffix(".source.onnx") if file.form == "int8" else file.path
    export_onnx(model, source, shape)
    if file.form == "int8":
        images = np.random.default_rng(0).standard_normal((CALIBRATION_IMAGES, *shape)).astype(np.float32)
        quantize_onnx(source, file.path, images)
        source.unlink()
