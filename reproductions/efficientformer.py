"""EfficientFormer's two claims on this machine: one layout is faster than reshapes, and slimming by latency.

First, EfficientFormer-L1 itself, folded, is timed against the same arithmetic with a reshape to tokens and
back around every MLP (equal weights, equal answers), and against that with the layer norms of transformers
in place of folded batch norms.

Second, the latency-driven slimming runs as published (section 4.3), small: a supernet with two stages on
Fashion-MNIST, a table of measured latencies, greedy steps down to 60 % of the full design's latency. The full
design, the slimmed one and a control of equal predicted latency, the full design narrowed evenly, are trained
from scratch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.data.sources import load_dataset
from featherweight.export.onnx import export_onnx
from featherweight.measure.count import count
from featherweight.measure.latency import Latency, compare
from featherweight.models.efficientformer import EfficientFormer, MapNorm, PoolBlock, TokenBlock, TokenStage
from featherweight.registry import create_model
from featherweight.train.batches import ArrayData, normalise
from featherweight.train.loop import evaluate
from featherweight.train.slimming import (
    EMBED,
    IDENTITY,
    Design,
    LatencyTable,
    Piece,
    Supernet,
    first_design,
    possible_pieces,
    refresh_norms,
    slim,
)
from featherweight.workflows.latency_table import build_latency_table
from featherweight.workflows.miniature import Plan, accuracies
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = (
    "The same arithmetic is faster without reshapes around every MLP; slimming by measured latency reaches "
    "60 % of the full design's latency for less than 2 points of accuracy."
)
WIDTHS, DEPTHS, HEADS = (32, 64), (3, 4), 2
KINDS = (("pool",), ("pool", "token"))
LATE = ("token",)
SIDE = 28
BUDGET, TOLERANCE, MAX_LOSS = 0.6, 0.1, 0.02
"""Part of the latency to keep; how far the measured part may exceed it undecided; accuracy that may go."""

ONE_LAYOUT, RESHAPES, NORMS = "one layout (EfficientFormer-L1)", "reshapes", "reshapes and layer norms"
FULL, SLIMMED, EVEN = "full design", "slimmed by latency", "narrowed evenly"


class ReshapingBlock(nn.Module):
    """A folded `PoolBlock` whose MLP works on tokens: `(N, C, H, W)` to the same shape and answer.

    Args:
        block: the block, already folded.
        norm: put a layer norm before the MLP.
    """

    def __init__(self, block: PoolBlock, norm: bool) -> None:
        super().__init__()
        self.pool, self.scale = block.pool, block.scale1
        self.norm = nn.LayerNorm(block.project.conv.out_channels) if norm else nn.Identity()
        self.mlp = nn.Sequential(_linear(block.expand.conv), nn.GELU(), _linear(block.project.conv))

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours on the map, channels on the tokens."""
        x = x + self.scale(self.pool(x) - x)
        tokens = self.mlp(self.norm(x.flatten(2).transpose(1, 2)))  # (N, H * W, C)
        return x + tokens.transpose(1, 2).unflatten(2, (int(x.shape[2]), int(x.shape[3])))


def _linear(conv: nn.Conv2d) -> nn.Linear:
    linear = nn.Linear(conv.in_channels, conv.out_channels)
    linear.weight, linear.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
    return linear


def reshaping(model: EfficientFormer, norm: bool) -> EfficientFormer:
    """Return a copy of a folded network with a reshape before and after every MLP on maps."""
    model = copy.deepcopy(model)
    for index, module in enumerate(model.body):
        if isinstance(module, PoolBlock):
            model.body[index] = ReshapingBlock(module, norm)
    return model


def layouts(quick: bool) -> tuple[list[dict[str, Any]], str, dict[str, list[float]]]:
    """Time the three layouts in turns; return rows, verdict and medians in milliseconds."""
    torch.manual_seed(0)
    side = 64 if quick else 224
    model = create_model("efficientformer_l1", width=0.25 if quick else 1.0, scale=0.3).eval().fuse()
    nets = {ONE_LAYOUT: model, RESHAPES: reshaping(model, False), NORMS: reshaping(model, True)}
    x = torch.randn(1, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(nets[RESHAPES](x), model(x), rtol=1e-3, atol=1e-3)
    found = timed(nets, (3, side, side), 20 if quick else 100)
    ours, theirs = found[ONE_LAYOUT].interval, found[RESHAPES].interval
    verdict = HOLDS if ours[1] < theirs[0] else FAILS if theirs[1] < ours[0] else OPEN
    rows = [_row(name, net, (3, side, side), found[name]) for name, net in nets.items()]
    return rows, verdict, {f"{name}, latency in ms": [latency.p50_ms] for name, latency in found.items()}


def timed(nets: dict[str, nn.Module], size: tuple[int, int, int], runs: int) -> dict[str, Latency]:
    """Time networks in turns, on one thread of onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.onnx" for index in range(len(nets))]
        for path, net in zip(paths, nets.values(), strict=True):
            export_onnx(net, path, size)
        return dict(zip(nets, compare(paths, 1, runs).latencies, strict=True))


def _row(name: str, net: nn.Module, size: tuple[int, int, int], latency: Latency) -> dict[str, Any]:
    counted = count(net, size)
    low, high = latency.interval
    text = f"{latency.p50_ms:.3f} ({low:.3f} to {high:.3f})"
    return {"network": name, "params": counted.params, "macs": counted.macs, "latency ms": text}


def piece_module(piece: Piece) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build one piece of the small supernet, and say how large its input is."""
    side, width = SIDE // 2 ** (piece.stage + 1), piece.width
    if piece.kind == "pool":
        return PoolBlock(width, scale=1.0), (width, side, side)
    if piece.kind == "token":
        return TokenStage([TokenBlock(width, HEADS, scale=1.0)]), (width, side, side)
    if piece.stage == 0:
        convs = ConvNormAct(1, width // 2, 3, 1, bias=True), ConvNormAct(width // 2, width, 3, 2, bias=True)
        return nn.Sequential(*convs), (1, SIDE, SIDE)
    return ConvNormAct(piece.in_width, width, 3, 2, act=None, bias=True), (piece.in_width, 2 * side, 2 * side)


def head_module(width: int) -> nn.Module:
    """Build the end of the small networks."""
    return nn.Sequential(MapNorm(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def supernet(anneal_steps: int) -> Supernet:
    """Build the small supernet."""
    before = (0, *WIDTHS)
    embeds = [piece_module(Piece(EMBED, i, before[i], width))[0] for i, width in enumerate(WIDTHS)]
    stages = [
        [{kind: piece_module(Piece(kind, i, w, w))[0] for kind in KINDS[i]} for _ in range(DEPTHS[i])]
        for i, w in enumerate(WIDTHS)
    ]
    return Supernet(embeds, stages, head_module(WIDTHS[-1]), WIDTHS, (1.0, 0.1), anneal_steps)


def network(design: Design) -> EfficientFormer:
    """Build the network that a design describes."""
    kinds = [[kind for kind in stage if kind != IDENTITY] for stage in design.paths]
    return EfficientFormer(
        design.widths,
        [len(stage) for stage in kinds],
        kinds[-1].count("token"),
        stem_stride=1,
        heads=HEADS,
        distillation=False,
        scale=1.0,
        in_chans=1,
        num_classes=10,
    )


def evenly(full: Design, table: LatencyTable, budget_ms: float, step: int) -> Design:
    """Narrow all stages alike, in fractions of the full width, until the budget is met."""
    narrowest = Design(tuple(step for _ in full.widths), full.paths)
    for part in range(31, 0, -1):
        widths = tuple(max(step, round(width * part / 32 / step) * step) for width in full.widths)
        design = Design(widths, full.paths)
        if table.latency_ms(design) <= budget_ms:
            return design
    return narrowest


def search(
    plan: Plan, data_root: Path | None, step: int, runs: int, progress: Callable[[str], None]
) -> tuple[dict[str, Design], dict[str, Any]]:
    """Train the supernet, measure the table and slim; return the three designs and what was decided."""
    steps = int(plan.epochs * plan.train_images / plan.recipe["batch_size"])
    net = supernet(max(1, int(0.8 * steps)))
    accuracies({"supernet": lambda: net}, plan, data_root, progress)
    pieces = possible_pieces(WIDTHS, KINDS, step, step)
    head = head_module(WIDTHS[-1]), (WIDTHS[-1], SIDE // 4, SIDE // 4)
    table = build_latency_table(piece_module, pieces, head=head, runs=runs)
    full = first_design(WIDTHS, net.scores(), LATE)
    budget_ms = BUDGET * table.latency_ms(full)
    accuracy = design_accuracy(net, held_back(data_root, plan.test_images // 4))
    kept = slim(
        full,
        net.scores(),
        table,
        accuracy,
        budget_ms,
        late=LATE,
        width_step=step,
        min_width=step,
        progress=lambda taken: progress(f"{taken.action}: {taken.latency_ms:.3f} ms, {taken.accuracy:.1%}"),
    )
    designs = {FULL: full, SLIMMED: kept[-1].design, EVEN: evenly(full, table, budget_ms, step)}
    record = {
        "steps": [f"{taken.action}: {taken.latency_ms:.4f} ms, {taken.accuracy:.4f}" for taken in kept],
        "predicted_ms": {name: table.latency_ms(design) for name, design in designs.items()},
        "designs": {name: {"widths": d.widths, "paths": d.paths} for name, d in designs.items()},
        "width_step": step,
    }
    return designs, record


def held_back(data_root: Path | None, images: int) -> ArrayData:
    """Return validation images, which neither training nor the test has seen."""
    dataset = load_dataset("fashion-mnist", data_root=data_root)
    part = dataset.val.subset(range(min(images, len(dataset.val))))
    pixels = torch.from_numpy(part.decode((SIDE, SIDE), dataset.mode))
    scaled = pixels.float() / 255
    labels = torch.as_tensor(part.labels, dtype=torch.int64)
    return ArrayData(pixels, labels, (float(scaled.mean()),), (float(scaled.std()),))


def design_accuracy(net: Supernet, data: ArrayData) -> Callable[[Design], float]:
    """Return how well the supernet's weights classify the data when it acts as a design."""
    batch = normalise(data.images[:512].permute(0, 3, 1, 2), data.mean, data.std)

    def accuracy(design: Design) -> float:
        probe = copy.deepcopy(net).eval()
        probe.adopt(design)
        refresh_norms(probe, [batch])
        return float((evaluate(probe, data).argmax(1) == data.labels.numpy()).mean())

    return accuracy


def slimming_verdict(
    ratio: float, slimmed: Sequence[float], full: Sequence[float], images: int
) -> tuple[str, str]:
    """Judge the latency kept and the accuracy lost."""
    in_time = HOLDS if ratio <= BUDGET else OPEN if ratio <= BUDGET + TOLERANCE else FAILS
    good = judge([value + MAX_LOSS for value in slimmed], full, images)
    return in_time, good


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Time the layouts, slim the supernet, train what it found, and judge both claims."""
    rows, layout_verdict, measured = layouts(quick)
    progress(f"layouts: {layout_verdict}")
    recipe = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.02, "batch_size": 128, "bf16": False}
    shared = {"data": "fashion-mnist", "side": SIDE, "recipe": {**recipe, "label_smoothing": 0.0}}
    shared |= {"train_images": 500 if quick else 8_000, "test_images": 500 if quick else 10_000}
    plan = Plan(epochs=1 if quick else 5, seeds=(seed,), **shared)
    designs, record = search(plan, data_root, 32 if quick else 8, 10 if quick else 50, progress)
    plan = Plan(epochs=1 if quick else 4, seeds=(seed,) if quick else (seed, seed + 1, seed + 2), **shared)
    builders = {name: (lambda design=design: network(design)) for name, design in designs.items()}
    found, images = accuracies(builders, plan, data_root, progress)
    nets = {name: network(design).eval().fuse() for name, design in designs.items()}
    times = timed(nets, (1, SIDE, SIDE), 50 if quick else 300)
    ratio = times[SLIMMED].p50_ms / times[FULL].p50_ms
    in_time, good = slimming_verdict(ratio, found[SLIMMED], found[FULL], images)
    rows = [{**row, "test accuracy": "-"} for row in rows]
    rows += [
        {**_row(name, net, (1, SIDE, SIDE), times[name]), "test accuracy": mean_spread(found[name])}
        for name, net in nets.items()
    ]
    reason = (
        f"layouts: {layout_verdict}; slimmed to {ratio:.0%} of the measured latency: {in_time}; "
        f"{mean_spread(found[SLIMMED])} against {mean_spread(found[FULL])}, less than 2 points lost: {good}; "
        f"not part of the claim: better than narrowing evenly ({mean_spread(found[EVEN])}): "
        f"{judge(found[SLIMMED], found[EVEN], images)}"
    )
    measured |= found | {f"{name}, latency in ms": [times[name].p50_ms] for name in nets}
    verdict = overall([layout_verdict, in_time, good])
    return Reproduction(
        "efficientformer", CLAIM, rows, verdict, reason, measured, {**plan.setting(), **record}
    )
