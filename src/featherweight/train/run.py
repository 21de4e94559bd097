"""One process's training run: the steps, what happens at the end of an epoch, and its state."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from ..errors import UsageError
from .batches import BatchSource
from .checkpoint import State, save_state, save_tensors, write_run_file
from .ema import Ema
from .interrupt import Interrupt, deferred_interrupt
from .plan import Plan, validate
from .progress import ProgressCallback
from .schedule import build_optimizer, image_size, learning_rate, set_learning_rate

if TYPE_CHECKING:
    from .loop import Job

_STEP_EVENT_S = 0.2


class Run:
    """Holds the network, optimiser, average and counters of a run between steps."""

    def __init__(
        self, fabric: Fabric, job: Job, batches: BatchSource, plan: Plan, progress: ProgressCallback
    ) -> None:
        self.fabric, self.job, self.recipe, self.plan = fabric, job, job.recipe, plan
        self.batches, self.progress = batches, progress
        self.model = job.model.train()
        self.wrapped, self.optimizer = fabric.setup(self.model, build_optimizer(self.model, job.recipe))
        self.teacher = None if job.teacher is None else fabric.to_device(job.teacher)
        decay = job.recipe.ema_decay
        self.ema = None if decay is None else Ema(self.model, decay, job.recipe.ema_every)
        self.step, self.saved_step = 0, -1
        self.loss_sum, self.loss_count = 0.0, 0
        self.history: list[dict[str, Any]] = []
        self.final_accuracy: float | None = None
        self._between_steps = True
        self._wall_before, self._began = 0.0, job.began
        self._last_save = self._last_event = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, interruptions left out."""
        return self._wall_before + time.perf_counter() - self._began

    def train(self) -> tuple[float, float]:
        """Train to the end and write the final weights; return (wall seconds, validation score)."""
        self.progress({"event": "plan", **dataclasses.asdict(self.plan)})
        with deferred_interrupt(self.fabric.world_size == 1) as asked:
            if self.step == 0:
                self.plan = dataclasses.replace(self.plan, began_s=self.wall_s)
                self._save()
            try:
                self._loop(asked)
            except KeyboardInterrupt:
                if self._between_steps:
                    self._save()
                raise
        accuracy = self._finish()
        self.progress({"event": "done", "wall_s": self.wall_s, self.job.val.score_name: accuracy})
        return self.wall_s, accuracy

    def _loop(self, asked: Interrupt) -> None:
        """Step until done. Everything that may be interrupted lies between two complete steps."""
        while self.step < self.plan.total_steps:
            self._between_steps = False
            self._one_step()
            ends_epoch = self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.total_steps
            if ends_epoch:
                self._end_epoch()
            self._correct_pace()
            self._between_steps = True
            self._save_if_due(ends_epoch)
            if asked.requested:
                raise KeyboardInterrupt
            self._report_step()
            if ends_epoch:
                self.progress({"event": "epoch", **self.history[-1]})

    def _correct_pace(self) -> None:
        """Fit the number of steps to the time budget again; the new plan is stored before it is followed."""
        budget_s = self.recipe.time_budget_s
        if budget_s is None or self.recipe.epochs is not None or self.plan.world > 1:
            return
        if self.step < self.plan.total_steps and self.plan.is_due(self.step, self.wall_s, budget_s):
            self.plan = self.plan.corrected(self.step, self.wall_s, budget_s)
            self._save()

    def _one_step(self) -> None:
        plan, recipe, step = self.plan, self.recipe, self.step
        position = plan.position(step)
        lr = learning_rate(position, plan.total_steps, recipe)
        set_learning_rate(self.optimizer, lr)
        size = image_size(position, plan.total_steps, recipe)
        images, targets = self.batches.get(step, size, self.fabric.device)
        with self.fabric.autocast():
            loss = self.batches.loss(self.wrapped, images, targets, self.teacher)
        value = loss.item()
        if not math.isfinite(value):
            raise UsageError(
                f"Training diverged: loss {value} at step {step} with lr {lr:.3g}. Lower the lr."
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if recipe.clip_norm is not None:
            self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=recipe.clip_norm)
        self.optimizer.step()
        self.step = step + 1
        if self.ema is not None:
            self.ema.update(self.step, force=self.step == plan.total_steps)
        self.loss_sum += value
        self.loss_count += 1

    def _end_epoch(self) -> None:
        """Validate if due, and append the epoch to history and `metrics.jsonl`."""
        epoch = math.ceil(self.step / self.plan.steps_per_epoch)
        last = self.step == self.plan.total_steps
        mean_loss = self.loss_sum / max(1, self.loss_count)
        if self.fabric.world_size > 1:
            mean_loss = self.fabric.all_reduce(torch.tensor(mean_loss, dtype=torch.float64)).item()
        score = val_loss = None
        if len(self.job.val) and (last or epoch % self.plan.eval_every == 0):
            score, val_loss = self._validate(exact=last)
        line = {
            "epoch": epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": mean_loss,
            self.job.val.score_name: score,
            "val_loss": val_loss,
            "wall_s": round(self.wall_s, 3),
        }
        self.history.append(line)
        self.loss_sum, self.loss_count = 0.0, 0
        if self.fabric.global_rank == 0:
            # Rewritten as a whole: a line that a killed run wrote after its last state is not repeated.
            lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
            write_run_file(self.job.out_dir / "metrics.jsonl", lines.encode())

    def _validate(self, *, exact: bool) -> tuple[float, float]:
        """Return rank 0's (score, loss) of the averaged weights; `exact` does it in float32."""
        result = (math.nan, math.nan)
        if self.fabric.global_rank == 0:
            bf16 = self.plan.bf16 and not exact
            with contextlib.nullcontext() if self.ema is None else self.ema.applied():
                result = validate(self.model, self.job.val, bf16=bf16)
        return self.fabric.broadcast(result)

    def _report_step(self) -> None:
        now, history = time.perf_counter(), self.history
        if now - self._last_event < _STEP_EVENT_S and self.step < self.plan.total_steps:
            return
        self._last_event = now
        seconds = self.wall_s / self.step
        self.progress(
            {
                "event": "step",
                "step": self.step,
                "total_steps": self.plan.total_steps,
                "epoch": math.ceil(self.step / self.plan.steps_per_epoch),
                "loss": self.loss_sum / self.loss_count if self.loss_count else history[-1]["train_loss"],
                "lr": self.optimizer.param_groups[0]["lr"],
                "eta_s": seconds * (self.plan.total_steps - self.step),
                "images_per_s": self.batches.local_size * self.batches.world / seconds,
            }
        )

    def _save_if_due(self, ends_epoch: bool) -> None:
        """Save every so often and after epochs, but not more than once a second after tiny ones."""
        every = self.recipe.checkpoint_every_s
        waited = time.perf_counter() - self._last_save
        if (
            waited >= every
            or (ends_epoch and waited >= min(1.0, every))
            or self.step == self.plan.total_steps
        ):
            self._save()

    def _save(self) -> None:
        """Write the state, once per step, from rank 0."""
        if self.fabric.global_rank != 0 or self.saved_step == self.step:
            return
        tensors, scalars = self._state()
        save_state(self.job.out_dir, self.step, tensors, scalars)
        self.saved_step, self._last_save = self.step, time.perf_counter()
        self.progress({"event": "checkpoint", "step": self.step})

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the rest of the run depends on."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": t for name, t in self.ema.shadow.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in slots.items() if t is not None}
        scalars = {
            "identity": self.job.identity(),
            "plan": dataclasses.asdict(self.plan),
            "history": self.history,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "ema_step": self.ema.last_step if self.ema is not None else 0,
            "wall_s": self.wall_s,
        }
        return tensors, scalars

    def restore(self, state: State) -> None:
        """Take up a stored state, its memory layout included."""
        scalars = state.scalars
        self.model.load_state_dict(_section(state.tensors, "model."))
        if self.ema is not None:
            self.ema.load(_section(state.tensors, "ema."), scalars["ema_step"])
        self._restore_optimizer(_section(state.tensors, "optimizer."))
        self.step = self.saved_step = state.step
        self.loss_sum, self.loss_count = scalars["loss_sum"], scalars["loss_count"]
        self.history = list(scalars["history"])
        self._wall_before = scalars["wall_s"]

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Load moments into tensors laid out like their parameters: the fused kernels walk raw memory."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for key, loaded in tensors.items():
            index, name = key.split(".", 1)
            parameter = parameters[int(index)]
            if loaded.shape == parameter.shape:
                loaded = torch.empty_like(parameter, requires_grad=False).copy_(loaded)
            slots.setdefault(int(index), {})[name] = loaded
        content = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": content["param_groups"]})

    def _finish(self) -> float:
        """Give the network its final weights, write them, and return their validation score."""
        if self.ema is not None:
            self.ema.swap()
        if self.fabric.global_rank == 0:
            save_tensors(self.job.out_dir / "model.safetensors", self.model.state_dict())
        self.fabric.barrier()
        score = self.history[-1][self.job.val.score_name]
        return math.nan if score is None else score


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
