"""ConvFirst's claims in miniature: fewer MACs at equal accuracy, and a block at once instead of by layers.

Three ConvFirst blocks of 32 channels are trained against three MBConv blocks on Fashion-MNIST; the claim is
that they lose at most one point, with fewer MACs at equal width. Then a stack of four blocks of 64 channels
runs layer by layer and in strips of rows, which is block fusion without a kernel of its own: the widened map
exists only for a strip. Both are timed in turns on one thread, and the computational efficiency is taken from
the peak measured on the same machine. Fusion can pay only where the widened map overflows the cache, so the
claim is judged on the largest map alone, of 12.8 MB; the smaller ones show what the strips cost elsewhere.
The paper's factor of four against ConvNeXt needs its kernels and a GPU: it is not tested here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.measure.count import count
from featherweight.measure.kernels import list_kernels
from featherweight.measure.latency import Latency, summarize
from featherweight.measure.roofline import Roofline, Waterline, measure_roofline
from featherweight.models.convfirst import ConvFirst, ConvFirstNet, MBConv
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = (
    "At equal width ConvFirst loses at most one point to MBConv and has fewer MACs, and where the widened "
    "map overflows the cache, blocks run whole, in strips, beat the same blocks run layer by layer."
)
BLOCKS = {"3 ConvFirst blocks": ConvFirst, "3 MBConv blocks": MBConv}
SIDE, CHANNELS = 28, 32
MARGIN = 0.01
"""Accuracy that ConvFirst may lose."""

STACK_CHANNELS, STACK_DEPTH = 64, 4
STACK_SIDES = (28, 64, 112)
STRIP_ROWS = (2, 4, 8, 16)


def build(name: str) -> nn.Module:
    """Build one of the two nets for grey images: stem, three blocks at 14x14, head."""
    return ConvFirstNet(((CHANNELS, 3),), block=BLOCKS[name], num_classes=10, in_chans=1)


def stack() -> nn.Sequential:
    """Build the blocks to time, batch norms folded, channels last."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(ConvFirst(STACK_CHANNELS, STACK_CHANNELS) for _ in range(STACK_DEPTH))).eval()
    for block in blocks:
        block.fuse()
    return blocks.to(memory_format=torch.channels_last)


def run_strips(blocks: nn.Sequential, rows: int, x: Tensor) -> Tensor:
    """Run each block in strips of so many rows."""
    for block in blocks:
        x = block.forward_strips(x, rows)
    return x


@torch.no_grad()
def time_in_turns(ways: dict[str, Callable[[Tensor], Tensor]], x: Tensor, runs: int) -> dict[str, Latency]:
    """Time several ways to compute the same, one run each in turns, after three runs to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(-3, runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way(x)
            if run >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summarize(found, threads=1) for name, found in times.items()}


def time_stack(side: int, runs: int, roofline: Roofline) -> tuple[str, list[dict[str, Any]], list[float]]:
    """Compare the two ways on one map: verdict, rows to print, and both medians in milliseconds.

    The height of the strips is chosen in a first round; the second round compares, so that the choice does
    not flatter.
    """
    blocks = stack()
    x = torch.rand(1, STACK_CHANNELS, side, side).to(memory_format=torch.channels_last)
    strips = {rows: functools.partial(run_strips, blocks, rows) for rows in STRIP_ROWS if rows < side}
    screened = time_in_turns({str(rows): way for rows, way in strips.items()}, x, max(5, runs // 4))
    rows = min(strips, key=lambda rows: screened[str(rows)].p50_ms)
    layers_name, strips_name = "layer by layer", f"strips of {rows} rows"
    found = time_in_turns({layers_name: blocks, strips_name: strips[rows]}, x, runs)
    counted = count(blocks, tuple(x.shape[1:]))
    table = []
    for name, fused in ((layers_name, ()), (strips_name, (ConvFirst,))):
        waterline = Waterline(tuple(list_kernels(blocks, tuple(x.shape[1:]), fused=fused)), roofline)
        latency = found[name]
        table.append(
            {
                "network": f"{STACK_DEPTH} ConvFirst blocks, {side}x{side}, {name}",
                "params": counted.params,
                "macs": counted.macs,
                "test accuracy": "",
                "latency": f"{latency.p50_ms:.2f} ms [{latency.interval[0]:.2f}, {latency.interval[1]:.2f}]",
                "efficiency": f"{roofline.efficiency(counted.macs, latency.p50_ms / 1e3):.0%}",
                "attainable": f"{waterline.efficiency:.0%} at {waterline.intensity:.0f} operations/byte",
            }
        )
    return (
        faster(found[strips_name], found[layers_name]),
        table,
        [found[name].p50_ms for name in (layers_name, strips_name)],
    )


def faster(first: Latency, second: Latency) -> str:
    """Say whether the first latency lies below the second; intervals that meet decide nothing."""
    if first.interval[1] < second.interval[0]:
        return HOLDS
    return FAILS if first.interval[0] > second.interval[1] else OPEN


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train both nets for equal epochs, then time the stack on three maps."""
    plan = Plan.sized(
        quick,
        seed,
        data="fashion-mnist",
        train_images=(500, 10_000),
        test_images=(500, 10_000),
        side=SIDE,
        epochs=5,
        optimizer="adamw",
        lr=4e-3,
        weight_decay=0.02,
        batch_size=64,
    )
    builders = {name: functools.partial(build, name) for name in BLOCKS}
    found, images = accuracies(builders, plan, data_root, progress)
    ours, rival = found.values()
    rows = [
        {
            "network": name,
            **sizes(make, (1, SIDE, SIDE)),
            "test accuracy": mean_spread(found[name]),
            "latency": "",
            "efficiency": "",
            "attainable": "",
        }
        for name, make in builders.items()
    ]
    verdicts = {
        f"accuracy within {MARGIN:.0%}": judge([value + MARGIN for value in ours], rival, images),
        "fewer MACs": HOLDS if rows[0]["macs"] < rows[1]["macs"] else FAILS,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        roofline = measure_roofline(runs=3 if quick else 30)
        for side in STACK_SIDES[-1:] if quick else STACK_SIDES:
            verdict, table, medians = time_stack(side, 5 if quick else 100, roofline)
            progress(f"{side}x{side}: {medians[0]:.2f} ms by layers, {medians[1]:.2f} ms in strips")
            if side == STACK_SIDES[-1]:
                verdicts[f"strips at {side}x{side}"] = verdict
            found[f"latency_ms at {side}x{side}: layers, strips"] = medians
            rows += table
    finally:
        torch.set_num_threads(threads)
    setting = {
        **plan.setting(),
        "peak_gmacs_per_s": round(roofline.peak_macs_per_s / 1e9, 1),
        "bandwidth_gb_per_s": round(roofline.bandwidth_bytes_per_s / 1e9, 1),
    }
    reason = "; ".join(f"{what}: {verdict}" for what, verdict in verdicts.items())
    return Reproduction("convfirst", CLAIM, rows, overall(list(verdicts.values())), reason, found, setting)
