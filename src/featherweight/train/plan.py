"""Decides, once and before training, what depends on the machine: precision, length, validation rhythm.

All timing runs on copies of the network, so the training that follows is untouched by it. The plan is
stored with the state; a resumed run reads it back instead of timing again.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import ArrayData, BatchSource, ValidationData, normalise
from .recipe import Recipe
from .schedule import build_optimizer, image_size

_PROBE_IMAGES = 512
# Parts of a time budget that are planned for: by the first estimate, and by corrections from the pace so far.
_FIRST_MARGIN = 0.95
_MARGIN = 0.98
_EVAL_SHARE = 0.03
_CHECKS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Plan:
    """What was decided: steps in all and per epoch, precision, epochs between validations, threads.

    A first estimate of the steps that fit a time budget is corrected during the training (`corrected`). Then
    `anchor_step` is the step of the last correction and `anchor_share` the part of the schedule done by then;
    `began_s` is the wall time in seconds that went by before the first step.
    """

    total_steps: int
    steps_per_epoch: int
    bf16: bool
    eval_every: int
    threads: int
    world: int
    anchor_step: int = 0
    anchor_share: float = 0.0
    checks: int = 0
    began_s: float = 0.0

    def position(self, step: int) -> float:
        """Return where `step` lies in the schedule, in steps of `total_steps`; corrections make no jump."""
        if self.anchor_step == 0:
            return step
        rest = (step - self.anchor_step) / max(1, self.total_steps - self.anchor_step)
        return self.total_steps * (self.anchor_share + (1 - self.anchor_share) * rest)

    def is_due(self, step: int, wall_s: float, budget_s: float) -> bool:
        """Return whether the pace is to be checked: at fixed parts of the time or of the schedule."""
        done = max(wall_s / budget_s, self.position(step) / self.total_steps)
        return self.checks < len(_CHECKS) and done >= _CHECKS[self.checks]

    def corrected(self, step: int, wall_s: float, budget_s: float) -> Plan:
        """Return the plan with as many steps as fit the rest of the budget at the pace so far."""
        share = self.position(step) / self.total_steps
        done = max(wall_s / budget_s, share)
        pace_s = (wall_s - self.began_s) / step
        left = int((_MARGIN * budget_s - wall_s) / pace_s)
        return dataclasses.replace(
            self,
            total_steps=step + max(1, left),
            anchor_step=step,
            anchor_share=share,
            checks=sum(check <= done for check in _CHECKS),
        )


@torch.inference_mode()
def evaluate(model: nn.Module, data: ArrayData, batch_size: int = 256, *, bf16: bool = False) -> np.ndarray:
    """Return the logits (N, K) of every image as float32, in evaluation mode; the mode is put back."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training, parts = model.training, []
    model.eval()
    try:
        for start in range(0, len(data), batch_size):
            images = data.images[start : start + batch_size].to(device).permute(0, 3, 1, 2)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                parts.append(model(normalise(images, data.mean, data.std)).float().cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts).numpy() if parts else np.zeros((0, 0), np.float32)


def score(logits: np.ndarray, labels: Tensor) -> tuple[float, float]:
    """Return (accuracy from 0 to 1, mean cross entropy) of logits (N, K)."""
    if len(labels) == 0:
        return math.nan, math.nan
    accuracy = float((logits.argmax(1) == labels.numpy()).mean())
    return accuracy, float(F.cross_entropy(torch.from_numpy(logits), labels))


def validate(model: nn.Module, val: ArrayData | ValidationData, *, bf16: bool = False) -> tuple[float, float]:
    """Return (score, loss) on the validation data; of labelled images accuracy and cross entropy."""
    if isinstance(val, ArrayData):
        return score(evaluate(model, val, bf16=bf16), val.labels)
    return val.score(model, bf16=bf16)


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def time_step(
    model: nn.Module,
    batches: BatchSource,
    recipe: Recipe,
    teacher: nn.Module | None,
    bf16: bool,
    limit_s: float,
) -> float:
    """Return the median seconds of a training step on a copy of `model`, augmentation included."""
    device = next(model.parameters()).device
    copied = copy.deepcopy(model).train()
    optimizer, times = build_optimizer(copied, recipe), []
    began = time.perf_counter()
    # Step 0 warms up caches and kernels; a network too slow for more is judged by one step.
    for step in range(9):
        start = time.perf_counter()
        images, targets = batches.get(step % batches.steps_per_epoch, None, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = batches.loss(copied, images, targets, teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - start)
        if step >= 1 and time.perf_counter() - began > limit_s:
            break
    return float(np.median(times[1:]))


def choose_bf16(model: nn.Module, batches: BatchSource, recipe: Recipe, teacher: nn.Module | None) -> bool:
    """Return whether to train in bfloat16: the recipe's word, or the faster of the two by 5 % at least.

    Several processes must agree without a race of stopwatches, so they go by the processor's abilities.
    """
    if recipe.bf16 != "auto":
        return bool(recipe.bf16)
    if not cpu_has_bf16():
        return False
    if batches.world > 1:
        return True
    limit_s = 0.01 * (recipe.time_budget_s or 60.0)
    full = time_step(model, batches, recipe, teacher, False, limit_s)
    half = time_step(model, batches, recipe, teacher, True, limit_s)
    return half < 0.95 * full


def _mean_cost(batches: BatchSource, recipe: Recipe) -> float:
    """Return a step's mean cost under the image schedule, as a part of a full-size step's."""
    if not recipe.image_schedule:
        return 1.0
    sizes = [image_size(step, 1000, recipe) or batches.side for step in range(1000)]
    return sum((size / batches.side) ** 2 for size in sizes) / len(sizes)


def make_plan(
    model: nn.Module,
    batches: BatchSource,
    val: ArrayData | ValidationData,
    recipe: Recipe,
    teacher: nn.Module | None,
    *,
    bf16: bool,
    began: float,
) -> Plan:
    """Fix the number of steps and the validation rhythm.

    Args:
        model: The network; only copies of it are stepped.
        batches: The training batches.
        val: The validation images.
        recipe: The recipe; a time budget counts from `began`.
        teacher: Distillation teacher, part of the step's cost.
        bf16: The chosen precision.
        began: `time.perf_counter()` at the start of the run.
    """
    per_epoch, threads = batches.steps_per_epoch, torch.get_num_threads()
    every, step_s, eval_s = recipe.eval_every, 0.0, 0.0
    if every is None or recipe.time_budget_s is not None:
        limit_s = 0.01 * (recipe.time_budget_s or 60.0)
        step_s = time_step(model, batches, recipe, teacher, bf16, limit_s) * _mean_cost(batches, recipe)
        eval_s = _time_evaluation(model, val, bf16)
    if every is None:
        every = max(1, math.ceil(eval_s / (_EVAL_SHARE * step_s * per_epoch)))
    total = round(recipe.epochs * per_epoch) if recipe.epochs is not None else None
    if recipe.time_budget_s is not None:
        left_s = _FIRST_MARGIN * (recipe.time_budget_s - (time.perf_counter() - began)) - 2 * eval_s
        affordable = int(left_s / (step_s + eval_s / (every * per_epoch)))
        total = affordable if total is None else min(total, affordable)
    return Plan(max(1, total), per_epoch, bf16, every, threads, batches.world)


def _time_evaluation(model: nn.Module, val: ArrayData | ValidationData, bf16: bool) -> float:
    """Return the estimated seconds of one pass over the validation images, from a part of them."""
    if len(val) == 0:
        return 0.0
    part = val.head(_PROBE_IMAGES if isinstance(val, ArrayData) else 1)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        validate(model, part, bf16=bf16)
        times.append(time.perf_counter() - start)
    return min(times) * len(val) / len(part)
