"""Latency-driven slimming: find widths and depths by training one supernet and cutting it along latency.

1. A supernet holds several candidate blocks at each position, each position with the identity beside them.
   Its output is their sum, weighted by a softmax over learned scores with noise, whose temperature falls.
2. A table says how long each block takes at each width on the device. It comes in as data; the workflow
   `latency_table` measures one on this machine.
3. A greedy loop makes the network faster step by step. Each step drops the least important block, or gives
   up the first block of the late kind (attention on tokens), or narrows the least important stage: whichever
   costs the least accuracy for each millisecond it saves, as measured on the supernet itself.

The design found is trained from scratch. The procedure knows no network: `Supernet` takes the pieces of any.

Differs: importance is a ratio of softmax probabilities, `exp(score - score of the identity)`, because raw
scores may be negative. The paper does not say how a narrower stage is judged; here the channels of least mean
magnitude are set to zero. It does not say either what replaces a block of the late kind; here the best other
candidate, if it scores above the identity. The loop starts from the best candidate at every position.

Reference: Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed", arXiv 2206.01191, s. 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BudgetError, UsageError

IDENTITY, EMBED = "identity", "embed"

Scores = Sequence[Sequence[Mapping[str, float]]]
"""By stage and position: candidate -> learned score, the identity among them."""


class Piece(NamedTuple):
    """One entry of a latency table: a block of a kind (`in_width` = `width`), or the way into a stage."""

    kind: str
    stage: int
    in_width: int
    width: int


@dataclass(frozen=True)
class Design:
    """A network cut out of a supernet: channels of each stage, and the kind of block at each position.

    >>> Design((16,), (("pool", "identity"),)).pieces()
    [Piece(kind='embed', stage=0, in_width=0, width=16), Piece(kind='pool', stage=0, in_width=16, width=16)]
    """

    widths: tuple[int, ...]
    paths: tuple[tuple[str, ...], ...]

    def pieces(self) -> list[Piece]:
        """Return what the network is made of, from the image on; identities cost nothing and are left out."""
        found, before = [], 0
        for stage, (width, kinds) in enumerate(zip(self.widths, self.paths, strict=True)):
            found.append(Piece(EMBED, stage, before, width))
            found += [Piece(kind, stage, width, width) for kind in kinds if kind != IDENTITY]
            before = width
        return found

    def with_kind(self, stage: int, position: int, kind: str) -> Design:
        """Return the design with another kind of block at one position."""
        kinds = list(self.paths[stage])
        kinds[position] = kind
        return replace(self, paths=(*self.paths[:stage], tuple(kinds), *self.paths[stage + 1 :]))

    def with_width(self, stage: int, width: int) -> Design:
        """Return the design with another number of channels in one stage."""
        return replace(self, widths=(*self.widths[:stage], width, *self.widths[stage + 1 :]))


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each piece on one device; `fixed_ms` is what every design pays, whatever it is."""

    entries: Mapping[Piece, float]
    fixed_ms: float = 0.0

    def latency_ms(self, design: Design) -> float:
        """Add up the pieces of a design.

        Raises:
            UsageError: a piece is not in the table.
        """
        pieces = design.pieces()
        missing = [piece for piece in pieces if piece not in self.entries]
        if missing:
            raise UsageError(
                f"The latency table lacks {len(missing)} pieces, first {missing[0]}. Measure them."
            )
        return self.fixed_ms + sum(self.entries[piece] for piece in pieces)


@dataclass(frozen=True)
class Step:
    """One step of slimming; `saved_ms` and `drop` (accuracy, 0 to 1) compare with the step before."""

    action: str
    design: Design
    latency_ms: float
    accuracy: float
    saved_ms: float = 0.0
    drop: float = 0.0

    def cost(self) -> tuple[float, float, float]:
        """Order steps: least accuracy lost per millisecond; among equals the larger saving, then accuracy.

        A gain in accuracy counts as no loss: dividing it by the saving would favour the smaller saving.
        """
        return (max(self.drop, 0.0) / self.saved_ms, -self.saved_ms, self.drop)


def possible_pieces(
    widths: Sequence[int], kinds: Sequence[Collection[str]], width_step: int = 16, min_width: int = 16
) -> list[Piece]:
    """Return every piece that a design cut from a supernet may need.

    Args:
        widths: channels of each stage of the supernet.
        kinds: candidates of each stage, without the identity.
        width_step: channels that narrowing takes away.
        min_width: least channels of a stage.
    """
    found, before = [], [0]
    for stage, (width, names) in enumerate(zip(widths, kinds, strict=True)):
        options = [*range(width, min(width, min_width) - 1, -width_step)]
        found += [Piece(EMBED, stage, a, b) for a in before for b in options]
        found += [Piece(kind, stage, b, b) for kind in names for b in options]
        before = options
    return found


def importance(scores: Mapping[str, float]) -> float:
    """Return how much likelier a position's blocks are than its identity."""
    return sum(math.exp(value - scores[IDENTITY]) for kind, value in scores.items() if kind != IDENTITY)


def first_design(widths: Sequence[int], scores: Scores, late: Collection[str] = ()) -> Design:
    """Return the full design: at every position the best block, late kinds only behind all others.

    The switch to late kinds is placed where the scores chosen add up to the most.

    Raises:
        UsageError: no placement gives every position a block.
    """
    flat = [options for stage in scores for options in stage]
    plans = []
    for switch in range(len(flat), -1, -1):
        chosen = [_best(options, late, index >= switch) for index, options in enumerate(flat)]
        if None not in chosen:
            plans.append((sum(o[k] for o, k in zip(flat, chosen, strict=True)), chosen))
    if not plans:
        raise UsageError("Every position needs a candidate block, and late ones must come after the others.")
    kinds = iter(max(plans, key=lambda plan: plan[0])[1])
    return Design(tuple(widths), tuple(tuple(next(kinds) for _ in stage) for stage in scores))


def actions(
    design: Design, scores: Scores, late: Collection[str] = (), width_step: int = 16, min_width: int = 16
) -> list[tuple[str, Design]]:
    """Return what one step of slimming may do, as (description, design): at most three choices."""
    active = [
        (stage, i) for stage, kinds in enumerate(design.paths) for i, k in enumerate(kinds) if k != IDENTITY
    ]
    weight = {place: importance(scores[place[0]][place[1]]) for place in active}
    found: dict[Design, str] = {}
    if active:
        stage, i = min(active, key=weight.__getitem__)
        found[design.with_kind(stage, i, IDENTITY)] = f"drop block {i} of stage {stage}"
    first = next(((s, i) for s, i in active if design.paths[s][i] in late), None)
    if first is not None:
        stage, i = first
        options = scores[stage][i]
        other = _best(options, late, False)
        kind = other if other is not None and options[other] > options[IDENTITY] else IDENTITY
        changed = design.with_kind(stage, i, kind)
        found.setdefault(changed, f"{design.paths[stage][i]} to {kind} at block {i} of stage {stage}")
    totals = {
        stage: sum(weight[place] for place in active if place[0] == stage)
        for stage, width in enumerate(design.widths)
        if width - width_step >= min_width
    }
    if totals:
        stage = min(totals, key=totals.__getitem__)
        width = design.widths[stage] - width_step
        found[design.with_width(stage, width)] = f"narrow stage {stage} to {width}"
    return [(what, changed) for changed, what in found.items()]


def slim(
    start: Design,
    scores: Scores,
    table: LatencyTable,
    accuracy: Callable[[Design], float],
    budget_ms: float,
    *,
    late: Collection[str] = (),
    width_step: int = 16,
    min_width: int = 16,
    progress: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Make a design faster, one step at a time, until the table says that it meets the budget.

    Args:
        start: the design to begin with, see `first_design`.
        scores: the supernet's learned scores.
        table: latency of every piece.
        accuracy: how good a design is, 0 to 1; usually the supernet's accuracy after `Supernet.adopt`.
        budget_ms: latency to reach, in milliseconds.
        late: kinds that may only stand behind all others.
        width_step: channels that narrowing takes away.
        min_width: least channels of a stage.
        progress: called with every step taken.

    Returns:
        The steps, the start first; the last one meets the budget.

    Raises:
        BudgetError: nothing that is left makes the network faster.
        UsageError: the table lacks a piece.
    """
    steps = [Step("start", start, table.latency_ms(start), accuracy(start))]
    while (now := steps[-1]).latency_ms > budget_ms:
        choices = []
        for what, design in actions(now.design, scores, late, width_step, min_width):
            latency = table.latency_ms(design)
            if latency < now.latency_ms:
                found = accuracy(design)
                saved, drop = now.latency_ms - latency, now.accuracy - found
                choices.append(Step(what, design, latency, found, saved, drop))
        if not choices:
            raise BudgetError(
                f"Slimming stops at {now.latency_ms:.3g} ms, over the budget of {budget_ms:.3g} ms. "
                "Allow narrower stages or give a larger budget."
            )
        steps.append(min(choices, key=Step.cost))
        if progress is not None:
            progress(steps[-1])
    return steps


class MetaPath(nn.Module):
    """One position of a supernet: candidates of equal output shape, and the identity, in a weighted sum.

    Args:
        candidates: name -> block that keeps the shape of its input.
    """

    def __init__(self, candidates: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.alpha = nn.Parameter(torch.zeros(len(candidates) + 1))
        self.chosen: str | None = None

    def weights(self, temperature: float | Tensor) -> Tensor:
        """Return the weight of each candidate and, last, of the identity; they add up to 1.

        In training, noise between 0 and 1 on each score makes every candidate be tried.
        """
        noise = torch.rand_like(self.alpha) if self.training else 0.0
        return ((self.alpha + noise) / temperature).softmax(0)

    def scores(self) -> dict[str, float]:
        """Return the learned score of each candidate."""
        return dict(zip((*self.candidates, IDENTITY), self.alpha.tolist(), strict=True))

    def forward(self, x: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """Add up all candidates, or run the chosen one."""
        if self.chosen is not None:
            return x if self.chosen == IDENTITY else self.candidates[self.chosen](x)
        *weights, own = self.weights(temperature)
        y = own * x
        for weight, block in zip(weights, self.candidates.values(), strict=True):
            y = y + weight * block(x)
        return y


class Supernet(nn.Module):
    """A network whose positions hold several candidates; trains in any loop as an ordinary network.

    Args:
        embeds: the way into each stage: image to the first map, then map to map.
        stages: for each stage and position, name -> candidate block.
        head: last map to logits.
        widths: channels of each stage.
        temperature: of the softmax, at the start and at the end of training.
        anneal_steps: training batches until the temperature has reached its end, geometrically.
    """

    def __init__(
        self,
        embeds: Sequence[nn.Module],
        stages: Sequence[Sequence[Mapping[str, nn.Module]]],
        head: nn.Module,
        widths: Sequence[int],
        temperature: tuple[float, float] = (2.0, 0.2),
        anneal_steps: int = 1000,
    ) -> None:
        super().__init__()
        self.embeds, self.head, self.widths = nn.ModuleList(embeds), head, tuple(widths)
        self.stages = nn.ModuleList(nn.ModuleList(map(MetaPath, stage)) for stage in stages)
        self.temperature, self.anneal_steps = temperature, anneal_steps
        self.register_buffer("seen", torch.zeros(()))
        for stage, width in enumerate(widths):
            self.register_buffer(f"magnitude{stage}", torch.zeros(width))
        self._masks: list[Tensor | None] = [None] * len(self.widths)

    def paths(self) -> Iterator[MetaPath]:
        """Yield every position, from the image on."""
        for stage in self.stages:
            yield from stage

    def scores(self) -> list[list[dict[str, float]]]:
        """Return the learned scores, by stage and position."""
        return [[path.scores() for path in stage] for stage in self.stages]

    def adopt(self, design: Design | None) -> None:
        """Act as `design` does with the supernet's weights; None goes back to the weighted sum."""
        kinds = iter(()) if design is None else (kind for stage in design.paths for kind in stage)
        for path in self.paths():
            path.chosen = next(kinds, None)
        widths = self.widths if design is None else design.widths
        self._masks = [self._mask(stage, width) for stage, width in enumerate(widths)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the stages one after another."""
        start, end = self.temperature
        temperature = start * (end / start) ** (self.seen / self.anneal_steps).clamp(max=1.0)
        for stage, (embed, paths) in enumerate(zip(self.embeds, self.stages, strict=True)):
            x = self._narrow(stage, embed(x))
            for path in paths:
                x = self._narrow(stage, path(x, temperature))
            if self.training:
                with torch.no_grad():
                    now = x.float().abs().transpose(0, 1).flatten(1).mean(1)
                    getattr(self, f"magnitude{stage}").lerp_(now, 0.05)
        if self.training:
            self.seen += 1
        return self.head(x)

    def _narrow(self, stage: int, x: Tensor) -> Tensor:
        mask = self._masks[stage]
        return x if mask is None else x * mask.to(x)[:, None, None]

    def _mask(self, stage: int, width: int) -> Tensor | None:
        if width == self.widths[stage]:
            return None
        magnitude = getattr(self, f"magnitude{stage}")
        return torch.zeros_like(magnitude).index_fill_(0, magnitude.topk(width).indices, 1.0)


@torch.no_grad()
def refresh_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of all batch norms anew: a design has others than the sum it was cut from.

    Args:
        model: the network, in evaluation mode; nothing but its batch norms changes.
        batches: images, ready for the network.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _best(options: Mapping[str, float], late: Collection[str], take_late: bool) -> str | None:
    """Return the block of the highest score among late or other kinds; None where there is none."""
    found = [kind for kind in options if kind != IDENTITY and (kind in late) == take_late]
    return max(found, key=options.__getitem__, default=None)
