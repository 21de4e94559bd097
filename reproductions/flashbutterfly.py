"""Long convolutions' claims in miniature: smooth and sparse kernels generalise better than rough ones.

The paper (section 3.2, table 1): kernels learnt tap by tap overfit; squashing small taps to zero, or
averaging neighbours, mends that. Fashion-MNIST at 16 pixels is read as a sequence of 256 numbers by the
paper's model, small; the same network is trained with plain kernels, squashed ones, smoothed ones, and both.
The roughness of the kernels in use (total variation of the magnitude of their spectrum, relative to its sum)
and their share of zero taps are reported beside the accuracy: the mechanism, whether or not the gain shows at
this scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from featherweight.ops.flashbutterfly import LongConvNet
from featherweight.ops.flashbutterfly.kernel import regularize
from featherweight.workflows.miniature import Plan, accuracies
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = "Squashing or smoothing the kernels of a long convolution raises its accuracy over plain kernels."
SIDE = 16
PLAIN = "plain kernels"
FORMS = {
    PLAIN: {"squash": 0.0},
    "squashed by 0.001": {"squash": 0.001, "kernel_dropout": 0.2},
    "smoothed over 7 taps": {"squash": 0.0, "smooth": 3},
    "smoothed and squashed": {"squash": 0.0005, "smooth": 3, "kernel_dropout": 0.2},
}


class Sequential1d(nn.Module):
    """`(N, 1, H, W)` read row by row, to `(N, 10)`."""

    def __init__(self, **form: float) -> None:
        super().__init__()
        self.net = LongConvNet(1, 10, length=SIDE * SIDE, channels=32, layers=2, **form)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.net(x.flatten(2).transpose(1, 2))


@torch.no_grad()
def describe(model: Sequential1d) -> tuple[float, float]:
    """Return the roughness of the kernels' spectra and the share of zero taps, means over the layers."""
    rough, zero = [], []
    for mixer in model.net.mixers:
        kernel = regularize(mixer.kernel, mixer.squash, mixer.smooth, 0.0, False)
        spectrum = torch.fft.rfft(kernel).abs()
        rough.append(float((spectrum.diff().abs().sum() / spectrum.sum()).item()))
        zero.append(float((kernel == 0).float().mean()))
    return sum(rough) / len(rough), sum(zero) / len(zero)


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the four forms and compare each with plain kernels."""
    plan = Plan(
        data="fashion-mnist",
        train_images=300 if quick else 5_000,
        test_images=300 if quick else 10_000,
        side=SIDE,
        epochs=1 if quick else 10,
        seeds=(seed,) if quick else (seed, seed + 1, seed + 2),
        recipe={"optimizer": "adamw", "lr": 4e-3, "weight_decay": 0.02, "batch_size": 64},
    )
    kernels: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    found, images = accuracies(
        {name: partial(Sequential1d, **form) for name, form in FORMS.items()},
        plan,
        data_root,
        progress,
        lambda name, model, _: kernels[name].append(describe(model)),
    )
    verdicts = {name: judge(found[name], found[PLAIN], images) for name in FORMS if name != PLAIN}
    rows = [
        {
            "kernels": name,
            "test accuracy": mean_spread(found[name]),
            "roughness of the spectrum": f"{sum(k[0] for k in kernels[name]) / len(kernels[name]):.3f}",
            "zero taps": f"{sum(k[1] for k in kernels[name]) / len(kernels[name]):.0%}",
            "claim": verdicts.get(name, "baseline"),
        }
        for name in FORMS
    ]
    measured = found | {f"{name}: roughness": [k[0] for k in kernels[name]] for name in FORMS}
    reason = "; ".join(f"{name}: {verdict}" for name, verdict in verdicts.items())
    return Reproduction(
        "flashbutterfly", CLAIM, rows, overall(list(verdicts.values())), reason, measured, plan.setting()
    )
