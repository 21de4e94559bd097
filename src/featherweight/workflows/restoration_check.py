"""PSNR and SSIM of a network on pairs of pictures, by the field's protocol, while torch still holds it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.data.bicubic import imresize
from featherweight.data.pictures import Pictures
from featherweight.measure.image_quality import psnr, ssim, to_y


def restore(model: nn.Module, low: np.ndarray) -> np.ndarray:
    """Return the restored picture (H, W, 3) as uint8, clipped and rounded, of a small one."""
    device = next(model.parameters()).device
    image = torch.from_numpy(np.array(low)).to(device).permute(2, 0, 1)[None].float() / 255
    return _pixels(model(image))


def _pixels(image: Tensor) -> np.ndarray:
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


class PictureCheck:
    """Validation pictures; the score is the mean PSNR in dB on luma, as many border pixels cut as the scale.

    Args:
        pictures: large and small pictures.
    """

    score_name = "val_psnr"

    def __init__(self, pictures: Pictures | None) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return 0 if self.pictures is None else len(self.pictures)

    def head(self, count: int) -> PictureCheck:
        """Return the first pictures."""
        return PictureCheck(None if self.pictures is None else self.pictures.take(range(len(self))[:count]))

    @torch.inference_mode()
    def score(self, model: nn.Module, *, bf16: bool = False) -> tuple[float, float]:
        """Return (mean PSNR in dB, mean absolute error from 0 to 1); the network's mode is put back."""
        assert self.pictures is not None
        training, scores, errors = model.training, [], []
        device = next(model.parameters()).device
        model.eval()
        try:
            for low, high in zip(self.pictures.low, self.pictures.high, strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    restored = restore(model, low)
                scores.append(psnr(to_y(restored), to_y(np.asarray(high)), self.border))
                errors.append(np.abs(restored.astype(np.float32) - high).mean() / 255)
        finally:
            model.train(training)
        return statistics.fmean(scores), float(np.mean(errors))

    @property
    def border(self) -> int:
        """Pixels cut from each edge before comparing."""
        assert self.pictures is not None
        return self.pictures.scale

    @torch.inference_mode()
    def measure(self, model: nn.Module | None) -> dict[str, float]:
        """Return mean PSNR and SSIM; without a network those of bicubic enlargement."""
        assert self.pictures is not None
        scores: list[Sequence[float]] = []
        for low, high in zip(self.pictures.low, self.pictures.high, strict=True):
            low, high = np.asarray(low), np.asarray(high)
            restored = imresize(low, self.pictures.scale) if model is None else restore(model.eval(), low)
            pair = to_y(restored), to_y(high)
            scores.append((psnr(*pair, self.border), ssim(*pair, self.border)))
        return {
            name: statistics.fmean(s)
            for name, s in zip(("psnr", "ssim"), zip(*scores, strict=True), strict=True)
        }
