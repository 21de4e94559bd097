"""FDConv's claim in miniature, on CIFAR-10: disjoint frequencies keep kernels diverse, at one kernel's size.

The paper (sections 1 and 3.2) says that the parallel kernels of a dynamic convolution end up with nearly the
same frequency response, while groups of disjoint frequencies can not, and that this pays in accuracy. As in
the paper the operators start from a trained plain network: its three inner convolutions become dynamic
convolutions of four kernels (mixed by a squeeze of the image, started as noisy copies), or frequency dynamic
convolutions of 8 groups, or stay. All three are then trained on for the same epochs. Diversity is the mean
cosine between the frequency responses of two kernels of a layer: 1 for kernels that pass the same
frequencies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.conv_operator import ConvOperator
from featherweight.data.sources import Split, load_dataset
from featherweight.ops.fdconv import FDConv2d
from featherweight.ops.replace import replace_convs
from featherweight.workflows.miniature import sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, Reproduction, judge, mean_spread, overall

CLAIM = (
    "The groups of FDConv respond to different frequencies, the kernels of a dynamic convolution to the "
    "same; after equal training FDConv is more accurate than plain and dynamic convolution."
)
PLAIN, DYNAMIC, OURS = "plain", "dynamic, 4 kernels", "FDConv, 8 groups"
SIDE, KERNELS, GROUPS = 32, 4, 8


class DynamicConv2d(ConvOperator):
    """A mixture of whole kernels, weighed anew for each image by a softmax (arXiv 1912.03458)."""

    def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        shape = (KERNELS, self.out_channels, self.in_channels, *self.kernel_size)
        self.kernels = nn.Parameter(torch.zeros(shape))
        hidden = max(self.in_channels // 4, 4)
        self.gate = nn.Sequential(nn.Linear(self.in_channels, hidden), nn.ReLU(), nn.Linear(hidden, KERNELS))

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Start from copies with a tenth of noise, so that they may part."""
        new = super().from_conv(conv, **kwargs)
        noise = torch.randn_like(new.kernels) * 0.1 * conv.weight.std()
        new.kernels.data.copy_(conv.weight + noise)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """`(N, Cin, H, W)` to `(N, Cout, H', W')`."""
        mix = self.gate(x.mean((2, 3))).softmax(1)
        weight = torch.einsum("nk,koihw->noihw", mix, self.kernels).flatten(0, 1)
        y = self.convolve(x.reshape(1, -1, *x.shape[2:]), weight, None, len(x))
        return y.reshape(len(x), -1, *y.shape[2:])


def network() -> nn.Sequential:
    """Build the plain network: a stem and three 3x3 convolutions of 32 and 48 channels."""
    layers = [
        ConvNormAct(3, 32, 3, 2),
        ConvNormAct(32, 32, 3),
        ConvNormAct(32, 48, 3, 2),
        ConvNormAct(48, 48, 3),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def converted(model: nn.Module, form: str) -> nn.Module:
    """Copy a trained network and put the operator into its three inner convolutions."""
    model = copy.deepcopy(model)
    inner = ("1.conv", "2.conv", "3.conv")
    if form == DYNAMIC:
        replace_convs(model, DynamicConv2d, where=inner)
    elif form == OURS:
        replace_convs(model, "fdconv", where=inner, kernel_num=GROUPS)
    return model


def similarity(model: nn.Module) -> float:
    """Return the mean cosine between frequency responses of two kernels of a layer, over layers and pairs."""
    found = []
    for layer in model.modules():
        if isinstance(layer, FDConv2d):
            kernels = layer.kernel(torch.eye(GROUPS))
        elif isinstance(layer, DynamicConv2d):
            kernels = layer.kernels
        else:
            continue
        matrices = kernels.detach().transpose(2, 3).flatten(3).flatten(1, 2)  # (n, Cout kh, Cin kw)
        responses = torch.fft.rfft2(matrices).abs().flatten(1)
        found += [float(F.cosine_similarity(a, b, dim=0)) for a, b in combinations(responses, 2)]
    return fmean(found)


def tensors(split: Split, limit: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, about -1 to 1, and their labels."""
    part = split.subset(np.arange(min(limit, len(split.labels))))
    pixels = torch.from_numpy(part.decode((SIDE, SIDE), mode)).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.47) / 0.25, torch.from_numpy(part.labels.astype(np.int64))


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, lr: float, seed: int) -> nn.Module:
    """Train with AdamW, a cosine schedule, shifts and flips; images and order depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr, weight_decay=0.02)
    steps = epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            dy, dx, mirror = torch.randint(0, 7, (3,), generator=generator).tolist()
            part = F.pad(x[rows], [3] * 4)[:, :, dy : dy + SIDE, dx : dx + SIDE]
            optimizer.zero_grad()
            F.cross_entropy(model(part.flip(3) if mirror % 2 else part), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the accuracy, 0 to 1."""
    answers = torch.cat([model(part).argmax(1) for part in x.split(200)])
    return float((answers == labels).double().mean())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train a plain network with every seed, convert it, train the three forms on, and compare."""
    images, first, second = (500, 1, 1) if quick else (2_000, 6, 4)
    seeds = (seed,) if quick else tuple(range(seed, seed + 3))
    dataset = load_dataset("cifar10", data_root=data_root)
    x, labels = tensors(dataset.train, images, dataset.mode)
    test, answers = tensors(dataset.test, 400 if quick else 2_000, dataset.mode)
    found: dict[str, list[float]] = {}
    for one in seeds:
        torch.manual_seed(one)
        start = train(network(), x, labels, first, 3e-3, one)
        found.setdefault("before", []).append(score(start, test, answers))
        unchanged = score(converted(start, OURS).eval(), test, answers)
        found.setdefault("FDConv before a step", []).append(unchanged)
        for form in (PLAIN, DYNAMIC, OURS):
            torch.manual_seed(one)
            model = train(converted(start, form), x, labels, second, 1e-3, one + 100)
            found.setdefault(form, []).append(score(model, test, answers))
            if form != PLAIN:
                found.setdefault(f"{form}, similarity", []).append(similarity(model))
            progress(f"seed {one}: {form} {found[form][-1]:.2%}")
    rows = []
    for form in (PLAIN, DYNAMIC, OURS):
        alike = found.get(f"{form}, similarity")
        counted = sizes(partial(converted, network(), form), (3, SIDE, SIDE))
        cosine = f"{fmean(alike):.3f}" if alike else "-"
        rows.append(
            {"network": form, **counted, "similarity": cosine, "test accuracy": mean_spread(found[form])}
        )
    diverse = max(found[f"{OURS}, similarity"]) < min(found[f"{DYNAMIC}, similarity"])
    verdicts = [
        HOLDS if diverse else FAILS,
        judge(found[OURS], found[PLAIN], len(test)),
        judge(found[OURS], found[DYNAMIC], len(test)),
    ]
    reason = (
        f"cosine of responses {rows[2]['similarity']} against {rows[1]['similarity']} for dynamic "
        f"convolution ({verdicts[0]}); {rows[2]['test accuracy']} against {rows[0]['test accuracy']} "
        f"for plain ({verdicts[1]}) and {rows[1]['test accuracy']} for dynamic convolution ({verdicts[2]}); "
        f"{mean_spread(found['before'])} before, {mean_spread(found['FDConv before a step'])} right after "
        "conversion"
    )
    setting = {"data": "cifar10", "train_images": len(x), "epochs": [first, second], "seeds": list(seeds)}
    return Reproduction("fdconv", CLAIM, rows, overall(verdicts), reason, found, setting)
