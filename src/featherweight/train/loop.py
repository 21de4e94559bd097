"""The training loop on Lightning Fabric: time budgets, exact resume, one process or several.

An interrupted and resumed run ends with the same weights, bit for bit, as an undisturbed one: each step
is a function of the stored tensors and the step's number alone (see `batches.py`), and what was measured
on the machine (see `plan.py`) is stored, not measured again.

`devices=2` starts two processes from a plain call; under `torchrun` the processes it started are used.
Batch norms keep each process's own statistics, rank 0's are the ones stored (torch has no synchronised
batch norm for processors). Started processes need the caller's `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from ..errors import CheckpointError, UsageError
from .batches import ArrayData, Augment, TrainingData, ValidationData
from .checkpoint import clear_states, load_state, load_tensors
from .memory import keep_freed_memory
from .plan import Plan, choose_bf16, evaluate, make_plan
from .progress import ProgressCallback, RichProgress, default_progress, silent
from .recipe import Recipe
from .run import Run

# Fabric announces its precision and process group; the plan event says the same in our words.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)

__all__ = ["TrainResult", "evaluate", "fit_model"]

FINAL_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        history: One dict per epoch, as in `metrics.jsonl`.
        best_epoch: 1-based epoch with the highest validation score (the last epoch's weights are kept).
        val_accuracy: Validation accuracy of the final weights in float32, 0 to 1; for other data than
            labelled images its score, such as PSNR in dB.
        wall_s: Training time in seconds, summed over interruptions.
        steps: Optimiser steps in all.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    val_accuracy: float
    wall_s: float
    steps: int


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to train; travels to started processes."""

    model: nn.Module
    train: TrainingData
    val: ArrayData | ValidationData
    recipe: Recipe
    augment: Augment | None
    out_dir: Path
    teacher: nn.Module | None
    resume: bool
    progress: ProgressCallback | None
    began: float
    bf16: bool

    def identity(self) -> dict[str, Any]:
        """Return what must not change between a run and its resumption."""
        recipe = self.recipe.to_dict()
        del recipe["checkpoint_every_s"], recipe["threads"]
        return {**recipe, "data": self.train.fingerprint()}


def fit_model(
    model: nn.Module,
    train: TrainingData,
    val: ArrayData | ValidationData,
    recipe: Recipe,
    augment: Augment | None,
    out_dir: str | Path,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    devices: int = 1,
    accelerator: str = "cpu",
) -> TrainResult:
    """Train `model` in place; it ends in evaluation mode with the averaged weights if the recipe has them.

    Args:
        model: Network from (N, C, H, W) to logits (N, K), or to what the training data's loss takes.
        train: Training images: `ArrayData`, or `PatchData` for restoration.
        val: Validation images; may be empty.
        recipe: How to train.
        augment: See `batches.Augment`; None trains on the images as they are.
        out_dir: Gets the state, `metrics.jsonl` and `model.safetensors`.
        teacher: Network whose answers on the same batch are a second target.
        resume: Continue from the state in `out_dir`, if there is one. False discards it.
        progress: Called with event dicts (see `progress.py`); None draws a bar on a terminal.
        devices: Number of processes, each with its own batch of `recipe.batch_size`.
        accelerator: Fabric's accelerator name.

    Raises:
        CheckpointError: The disk is full, or the state cannot be resumed.
        DataError: The data does not fit its description.
        UsageError: The training diverged, or a setting is out of range.
        KeyboardInterrupt: The user interrupted; a state was written first.
    """
    began, out_dir = time.perf_counter(), Path(out_dir)
    if devices < 1:
        raise UsageError(f"devices={devices}; expected at least 1.")
    world = int(os.environ.get("WORLD_SIZE", "1")) if _under_torchrun() else devices
    out_dir.mkdir(parents=True, exist_ok=True)
    threads_before, random_before = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(recipe.thread_count() if world == 1 else max(1, recipe.thread_count() // world))
    # Vanishing activations and moments otherwise cost hundreds of cycles each.
    torch.set_flush_denormal(True)
    keep_freed_memory()
    try:
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model.to(memory_format=layout)
        if teacher is not None:
            teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=layout)
        bf16 = _precision(model, train, recipe, augment, out_dir, teacher, resume, world)
        job = Job(model, train, val, recipe, augment, out_dir, teacher, resume, progress, began, bf16)
        result = _launch(job, world, accelerator)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads_before)
        torch.set_rng_state(random_before)
    model.load_state_dict(load_tensors(out_dir / FINAL_WEIGHTS))
    model.eval()
    return result


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _precision(
    model: nn.Module,
    train: TrainingData,
    recipe: Recipe,
    augment: Augment | None,
    out_dir: Path,
    teacher: nn.Module | None,
    resume: bool,
    world: int,
) -> bool:
    """Return whether this run uses bfloat16: the stored decision of a resumed run, or a fresh one."""
    state = load_state(out_dir) if resume and world == 1 else None
    if state is not None:
        return bool(state.scalars["plan"]["bf16"])
    batches = train.batches(recipe, augment, model, 0, world)
    return choose_bf16(model, batches, recipe, teacher)


def _launch(job: Job, world: int, accelerator: str) -> TrainResult:
    """Run the job in this process, in torchrun's, or in processes started here."""
    precision = "bf16-mixed" if job.bf16 else "32-true"
    if world == 1:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
        return _train(fabric, job)
    if _under_torchrun():
        fabric = Fabric(accelerator=accelerator, devices=world, strategy="ddp", precision=precision)
        fabric.launch()
        return _train(fabric, job)
    fabric = Fabric(accelerator=accelerator, devices=world, strategy="ddp_spawn", precision=precision)
    # The caller's callback belongs to this process; the started ones stay silent.
    parcel = functools.partial(_train_started, job=dataclasses.replace(job, progress=silent))
    return TrainResult(**fabric.launch(parcel))


def _train_started(fabric: Fabric, job: Job) -> dict[str, Any]:
    """Train in a started process, which got the tensors in memory shared with the others: take a copy."""
    torch.set_num_threads(max(1, job.recipe.thread_count() // fabric.world_size))
    torch.set_flush_denormal(True)
    keep_freed_memory()
    return dataclasses.asdict(_train(fabric, dataclasses.replace(job, model=copy.deepcopy(job.model))))


def _train(fabric: Fabric, job: Job) -> TrainResult:
    """Plan or resume, train, and write the final weights; runs in every process."""
    recipe, rank, world = job.recipe, fabric.global_rank, fabric.world_size
    batches = job.train.batches(recipe, job.augment, job.model, rank, world)
    if rank == 0 and not job.resume:
        clear_states(job.out_dir)
    # Rank 0 reads first: a fall-back to the previous state renames files.
    state = load_state(job.out_dir) if rank == 0 else None
    fabric.barrier()
    state = state if rank == 0 else load_state(job.out_dir)
    if state is None:
        fabric.to_device(job.model)
        plan = make_plan(job.model, batches, job.val, recipe, job.teacher, bf16=job.bf16, began=job.began)
        plan = fabric.broadcast(plan)
    else:
        _check_identity(state.scalars["identity"], job.identity(), job.out_dir)
        plan = Plan(**state.scalars["plan"])
        if plan.world != world:
            raise CheckpointError(
                f"The run used {plan.world} processes, not {world}; resume it with as many."
            )
        torch.set_num_threads(plan.threads)
    progress = job.progress or default_progress()
    run = Run(fabric, job, batches, plan, progress if rank == 0 else silent)
    try:
        if state is not None:
            run.restore(state)
        wall_s, accuracy = run.train()
    finally:
        if isinstance(progress, RichProgress):
            progress.close()
    name = job.val.score_name
    scored = [line for line in run.history if line[name] is not None]
    best = max(scored, key=lambda line: line[name], default={"epoch": len(run.history)})
    return TrainResult(run.history, best["epoch"], accuracy, wall_s, run.plan.total_steps)


def _check_identity(stored: dict[str, Any], now: dict[str, Any], out_dir: Path) -> None:
    changed = [f"{key}: {stored.get(key)} -> {now[key]}" for key in now if stored.get(key) != now[key]]
    if changed:
        raise CheckpointError(
            f"The run in {out_dir} was started differently ({'; '.join(changed)}); resume it with the same "
            "settings and data, or choose another --out."
        )
