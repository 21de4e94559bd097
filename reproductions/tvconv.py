"""TVConv's claim in miniature, on MNIST: where the layout is fixed, kernels for each place pay.

The paper (sections 1 and 4) says that on aligned inputs a depthwise convolution with a kernel for each place
is more accurate at equal cost, or as accurate at a fraction of it. Digits of MNIST are centred. The same
narrow network is trained with depthwise and with translation variant convolutions, at equal inference MACs,
and a depthwise one of twice the width. Then the test images are shifted at random: that breaks the premise,
so the kernels for each place must lose more than the others. No augmentation moves the training images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.data.sources import Split, load_dataset
from featherweight.ops.replace import replace_convs
from featherweight.ops.tvconv import fuse_tvconvs
from featherweight.workflows.miniature import sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = (
    "On centred digits TVConv is more accurate than depthwise convolution at equal MACs, and it loses more "
    "when the digits are shifted, for it relies on their place."
)
OURS, PLAIN, WIDE = "TVConv", "depthwise", "depthwise, twice as wide"
SIDE, WIDTH, SHIFT = 28, 12, 4
"""Pixels of an image, channels of the narrow networks, and the largest shift in pixels."""


def network(form: str) -> nn.Module:
    """Build a stem and two blocks of a 3x3 depthwise and a 1x1 convolution, at 14 and 7 pixels."""
    width = 2 * WIDTH if form == WIDE else WIDTH
    blocks: list[nn.Module] = []
    for stride in (1, 2):
        blocks += [ConvNormAct(width, width, 3, stride, width), ConvNormAct(width, width, 1)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    model = nn.Sequential(ConvNormAct(1, width, 2, 2), *blocks, *head)
    model[0].conv.padding = (0, 0)
    if form == OURS:
        replace_convs(model, "tvconv", input_size=(1, SIDE, SIDE))
    return model


def tensors(split: Split, limit: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, scaled to mean 0, and their labels."""
    part = split.subset(np.arange(min(limit, len(split.labels))))
    pixels = torch.from_numpy(part.decode((SIDE, SIDE), mode)).permute(0, 3, 1, 2).float()
    return pixels / 255 - 0.13, torch.from_numpy(part.labels.astype(np.int64))


def train(model: nn.Module, x: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train with AdamW and a cosine schedule; the order of the images depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(x: Tensor, seed: int) -> Tensor:
    """Move each image by up to `SHIFT` pixels in both directions, filling with background."""
    moves = np.random.RandomState(seed).randint(-SHIFT, SHIFT + 1, (len(x), 2))
    padded = F.pad(x, [SHIFT] * 4, value=float(x.min()))
    views = [
        padded[i, :, SHIFT - dy : SHIFT - dy + SIDE, SHIFT - dx : SHIFT - dx + SIDE]
        for i, (dy, dx) in enumerate(moves)
    ]
    return torch.stack(views)


@torch.no_grad()
def score(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Return the accuracy, 0 to 1."""
    answers = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((answers == labels).double().mean())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three networks with every seed and test them on centred and on shifted digits."""
    images, epochs = (600, 1) if quick else (2_500, 8)
    seeds = (seed,) if quick else tuple(range(seed, seed + 3))
    dataset = load_dataset("mnist", data_root=data_root)
    x, labels = tensors(dataset.train, images, dataset.mode)
    test, answers = tensors(dataset.test, 500 if quick else 4_000, dataset.mode)
    moved = shifted(test, 0)
    found: dict[str, list[float]] = {}
    for one in seeds:
        for form in (OURS, PLAIN, WIDE):
            torch.manual_seed(one)
            model = fuse_tvconvs(train(network(form), x, labels, epochs, one))
            for place, data in (("centred", test), ("shifted", moved)):
                found.setdefault(f"{form}, {place}", []).append(score(model, data, answers))
            progress(f"seed {one}: {form} {found[f'{form}, centred'][-1]:.2%} centred")
    rows = []
    for form in (OURS, PLAIN, WIDE):
        counted = sizes(partial(network, form), (1, SIDE, SIDE))
        deployed = sizes(lambda form=form: fuse_tvconvs(network(form).eval()), (1, SIDE, SIDE))
        rows.append(
            {
                "network": form,
                **counted,
                "deployed params": deployed["params"],
                "centred": mean_spread(found[f"{form}, centred"]),
                "shifted": mean_spread(found[f"{form}, shifted"]),
            }
        )
    kept = {
        form: [b / a for a, b in zip(found[f"{form}, centred"], found[f"{form}, shifted"], strict=True)]
        for form in (OURS, PLAIN)
    }
    verdicts = [
        judge(found[f"{OURS}, centred"], found[f"{PLAIN}, centred"], len(test)),
        judge(kept[PLAIN], kept[OURS], len(test)),
    ]
    reason = (
        f"{rows[0]['centred']} against {rows[1]['centred']} at equal MACs ({verdicts[0]}) and "
        f"{rows[2]['centred']} at {rows[2]['macs'] / rows[0]['macs']:.1f} times the MACs; of that, shifted "
        f"digits leave {mean_spread(kept[OURS])} against {mean_spread(kept[PLAIN])} ({verdicts[1]})"
    )
    setting = {"data": "mnist", "train_images": len(x), "epochs": epochs, "seeds": list(seeds), "side": SIDE}
    return Reproduction("tvconv", CLAIM, rows, overall(verdicts), reason, found, setting)
