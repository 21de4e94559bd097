"""FlashFFTConv's claims in miniature: the fused convolution is exact and faster, and kernels can be cut.

Three parts. First, convolution with its backward pass by this machine's automatic choice, against the
library's transforms, on rows of 256 to 65,536 numbers: time in turns and the largest relative difference (the
paper: up to 7.93 times as fast on a GPU). Second, kernels as long as the sequence against kernels of 9 taps
(*partial* ones), in the same network on a path task: which of 16 x 16 images, read as a sequence, hold one
path between two marked ends and which two broken ones? Third, the trained network with growing shares of high
frequencies of its kernels set to zero (frequency-sparse convolution): the accuracy that is left, reported,
not judged.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.blocks.long_conv import long_conv
from featherweight.measure.latency import Latency, summarize, time_jobs
from featherweight.ops.flashfftconv import fft_conv
from featherweight.train.batches import ArrayData
from featherweight.train.loop import evaluate, fit_model
from featherweight.train.recipe import Recipe
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = (
    "The fused long convolution gives the library's result in less time, and long kernels solve a path task "
    "that short ones cannot."
)
SIDE, CHANNELS, LAYERS = 16, 24, 2
TAPS = {"kernels of the whole sequence": SIDE * SIDE, "kernels of 9 taps": 9}
KEPT = (1.0, 0.5, 0.25, 0.125)
"""Shares of the kernels' frequencies that stay."""


class PartialNet(nn.Module):
    """`(N, 1, H, W)` read row by row, to `(N, 2)`: residual long convolutions with gates, mean over the
    sequence.

    Args:
        taps: lags of each kernel on either side.
    """

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.kept = 1.0
        self.encoder = nn.Linear(1, CHANNELS)
        self.kernels = nn.ParameterList(0.05 * torch.randn(CHANNELS, 2 * SIDE * SIDE) for _ in range(LAYERS))
        self.mixers = nn.ModuleList(nn.Linear(CHANNELS, 2 * CHANNELS) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(LAYERS))
        self.decoder = nn.Linear(CHANNELS, 2)
        lag = torch.arange(2 * SIDE * SIDE)
        self.register_buffer("mask", torch.minimum(lag, 2 * SIDE * SIDE - lag) <= taps // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = self.encoder(x.flatten(2).transpose(1, 2))
        keep = math.ceil(self.kept * (SIDE * SIDE + 1))
        for kernel, mixer, norm in zip(self.kernels, self.mixers, self.norms, strict=True):
            u = norm(x).transpose(1, 2).contiguous()
            y = fft_conv(u, kernel * self.mask, causal=False, keep_bins=None if self.kept == 1 else keep)
            x = x + nn.functional.glu(mixer(nn.functional.gelu(y.transpose(1, 2))), -1)
        return self.decoder(x.mean(1))


def draw_paths(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (count, SIDE, SIDE) of uint8, and whether their two marked ends are joined by one path.

    Two paths wander from the left edge to the right one, in the upper and lower half, both drawn at half
    intensity. One end on either side is marked at full intensity: of the same path or not.
    """
    rows = torch.randint(-1, 2, (count, 2, SIDE), generator=generator).cumsum(-1)
    start = torch.randint(0, SIDE // 2, (count, 2, 1), generator=generator)
    rows = (start + rows).clamp(0, SIDE // 2 - 1) + torch.tensor([0, SIDE // 2])[:, None]
    images = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    column = torch.arange(SIDE).expand(count, 2, SIDE)
    images[torch.arange(count)[:, None, None], rows, column] = 110
    ends = torch.randint(0, 2, (count, 2), generator=generator)
    every = torch.arange(count)
    for side, end in zip((0, SIDE - 1), ends.T, strict=True):
        images[every, rows[every, end, side], side] = 255
    return images, (ends[:, 0] == ends[:, 1]).long()


def path_data(count: int, seed: int) -> ArrayData:
    """Return images of the path task, with their labels."""
    images, labels = draw_paths(count, torch.Generator().manual_seed(seed))
    return ArrayData(images[..., None], labels, (0.06,), (0.16,))


def train(taps: int, images: int, epochs: int, seed: int) -> PartialNet:
    """Train one network on the path task."""
    torch.manual_seed(seed)
    model = PartialNet(taps)
    recipe = Recipe(
        epochs=epochs, seed=seed, ema_decay=None, optimizer="adamw", lr=4e-3, weight_decay=0.01,
        batch_size=64, label_smoothing=0.0,
    )  # fmt: skip
    data = path_data(images, seed)
    with tempfile.TemporaryDirectory() as folder:
        fit_model(model, data, path_data(0, 0), recipe, None, folder, progress=lambda event: None)
    return model.eval()


def accuracy(model: PartialNet, test: ArrayData) -> float:
    """Return the share of right answers."""
    return float((evaluate(model, test).argmax(1) == test.labels.numpy()).mean())


def time_ways(length: int, runs: int) -> tuple[dict[str, Latency], float]:
    """Time a training pass by library and automatic choice, and compare their results."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4, max(1, 2**18 // length), length, generator=generator, requires_grad=True)
    taps = torch.randn(u.shape[1], length, generator=generator, requires_grad=True)

    def step(method: str) -> Tensor:
        y = long_conv(u, taps, method=method)
        torch.autograd.grad(y, (u, taps), torch.ones_like(y))
        return y

    times = time_jobs([lambda: step("library"), lambda: step("auto")], runs, warmup=2)
    exact, fused = step("library"), step("auto")
    error = float((exact - fused).detach().abs().max() / exact.detach().abs().max())
    return dict(zip(("library", "auto"), (summarize(row, 1) for row in times), strict=True)), error


def compare_ways(
    quick: bool, progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], str, list[float]]:
    """Return a row for each length, the verdict, and the speeds relative to the library."""
    rows, verdicts, speeds = [], [], []
    for length in (256, 4096) if quick else (256, 1024, 4096, 16_384, 65_536):
        found, error = time_ways(length, 5 if quick else 30)
        speeds.append(found["library"].p50_ms / found["auto"].p50_ms)
        apart = found["auto"].interval[1] < found["library"].interval[0]
        slower = found["auto"].interval[0] > found["library"].interval[1]
        verdicts.append(FAILS if slower or error > 1e-5 else HOLDS if apart else OPEN)
        result = f"{speeds[-1]:.2f} x the library, difference {error:.0e}"
        rows.append({"part": f"training pass, rows of {length}", "result": result, "claim": verdicts[-1]})
        progress(f"{length}: {result}")
    return rows, overall(verdicts), speeds


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Time the convolution, then train long and short kernels on the path task and cut the long ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, fast, speeds = compare_ways(quick, progress)
    finally:
        torch.set_num_threads(threads)
    images, epochs = (256, 1) if quick else (6_000, 12)
    seeds = (seed,) if quick else (seed, seed + 1, seed + 2)
    test = path_data(400 if quick else 4_000, 10_000)
    found: dict[str, list[float]] = {name: [] for name in TAPS}
    curve: dict[float, list[float]] = {kept: [] for kept in KEPT}
    for number in seeds:
        for name, taps in TAPS.items():
            model = train(taps, images, epochs, number)
            found[name].append(accuracy(model, test))
            progress(f"seed {number}: {name} {found[name][-1]:.2%}")
            for kept in KEPT if taps == SIDE * SIDE else ():
                model.kept = kept
                curve[kept].append(accuracy(model, test))
    long, short = found.values()
    solved = judge(long, short, len(test))
    rows += [
        {
            "part": f"path task, {name}",
            "result": mean_spread(values),
            "claim": solved if values is long else "",
        }
        for name, values in found.items()
    ]
    rows += [
        {"part": f"path task, {kept:.1%} of the frequencies kept", "result": mean_spread(values), "claim": ""}
        for kept, values in curve.items()
    ]
    measured = {
        **found,
        **{f"kept {kept}": values for kept, values in curve.items()},
        "times as fast": speeds,
    }
    setting = {
        "images": images,
        "epochs": epochs,
        "seeds": list(seeds),
        "test_images": len(test),
        "side": SIDE,
    }
    reason = (
        f"faster: {fast} ({statistics.geometric_mean(speeds):.2f} x); long against short kernels: {solved}"
    )
    return Reproduction("flashfftconv", CLAIM, rows, overall([fast, solved]), reason, measured, setting)
