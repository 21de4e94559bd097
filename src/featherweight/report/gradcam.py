"""Grad-CAM: where in an image a network finds its evidence for a class.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017, equations 1 and 2. The default target is the last feature map before pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from featherweight.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

SHORT_SIDE_PX = 128


def grad_cam(
    model: nn.Module,
    x: torch.Tensor | np.ndarray,
    target_module: nn.Module | None = None,
    class_index: int | Sequence[int] | None = None,
) -> np.ndarray:
    """Weigh each channel of the target map by its mean gradient, sum, rectify, and scale to the image's size.

    The model is run in eval mode and left in the mode it came in; no parameter's `.grad` is touched.

    Args:
        model: a classifier giving logits (N, K); without `target_module` it must have `forward_features`.
        x: preprocessed images (N, C, H, W).
        target_module: the module whose output (N, C', H', W') is explained.
        class_index: the class to explain, one for all or one for each image; by default the predicted one.

    Returns:
        float32 heat (N, H, W) in [0, 1]; each image's maximum is 1, or 0 where nothing speaks for the class.

    Raises:
        UsageError: no usable map, or a class index out of range.
    """
    import torch

    x = torch.as_tensor(x, dtype=torch.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            # a gradient on the input keeps frozen models differentiable
            maps, logits = _run(model, x.detach().clone().requires_grad_(True), target_module)
            index = _class_indices(class_index, logits)
            score = logits.gather(1, index[:, None]).sum()
            gradient = torch.autograd.grad(score, maps)[0]
    finally:
        model.train(was_training)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # equation 1
    cam = torch.relu((weights * maps.detach()).sum(dim=1, keepdim=True))  # equation 2
    cam = torch.nn.functional.interpolate(
        cam.float(), size=x.shape[-2:], mode="bilinear", align_corners=False
    )
    peak = cam.amax(dim=(2, 3), keepdim=True)
    return (cam / peak.where(peak > 0, torch.ones_like(peak)))[:, 0].cpu().numpy()


def _run(model: nn.Module, x: torch.Tensor, target: nn.Module | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target's feature map, still part of the graph, and the logits."""
    if target is None:
        if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
            raise UsageError(
                f"{type(model).__name__} has no forward_features and forward_head, which Grad-CAM "
                "explains by default. Pass target_module, for instance the last convolution."
            )
        maps = model.forward_features(x)
        logits = model.forward_head(maps)
    else:
        seen: list[torch.Tensor] = []
        hook = target.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            logits = model(x)
        finally:
            hook.remove()
        if not seen:
            raise UsageError(
                "target_module did not run in the forward pass. Pass a module that the model uses."
            )
        maps = seen[-1]
    if getattr(maps, "ndim", 0) != 4:
        raise UsageError(
            f"Grad-CAM needs a map (N, C, H, W), got shape {tuple(getattr(maps, 'shape', ()))}. "
            "Pass a target_module before the pooling."
        )
    return maps, logits


def _class_indices(class_index: int | Sequence[int] | None, logits: torch.Tensor) -> torch.Tensor:
    import torch

    if class_index is None:
        return logits.argmax(dim=1)
    index = torch.as_tensor(class_index, device=logits.device).long().expand(len(logits))
    if index.min() < 0 or index.max() >= logits.shape[1]:
        raise UsageError(f"class_index {class_index} is out of range, expected 0 to {logits.shape[1] - 1}.")
    return index


def overlay(image: Image.Image, cam: np.ndarray, opacity: float = 0.7) -> Image.Image:
    """Lay the heat (H, W) in [0, 1] over `image`: cold areas stay as they are, hot ones glow.

    A small image is enlarged without smoothing to a short side of 128 px first.

    >>> overlay(Image.new("L", (8, 8)), np.zeros((8, 8))).size
    (128, 128)
    """
    from matplotlib import colormaps

    scale = max(1, -(-SHORT_SIDE_PX // min(image.size)))
    size = (image.width * scale, image.height * scale)
    base = np.asarray(image.convert("RGB").resize(size, Image.Resampling.NEAREST), dtype=np.float32)
    heat = Image.fromarray(np.clip(cam, 0, 1).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    heat = np.clip(np.asarray(heat), 0, 1)
    colour = colormaps["inferno"](heat)[..., :3] * 255
    alpha = opacity * heat[..., None]
    return Image.fromarray((base * (1 - alpha) + colour * alpha).round().astype(np.uint8))
