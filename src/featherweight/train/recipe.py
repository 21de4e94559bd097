"""The training recipe: one frozen dataclass that says everything about a run but the data and the network."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UsageError, close_matches


@dataclass(frozen=True)
class Recipe:
    """How to train: optimiser, schedule, regularisation, length, precision.

    Attributes:
        optimizer: `"sgd"` (Nesterov momentum) or `"adamw"`.
        lr: Peak learning rate, for `batch_size` images in each process.
        weight_decay: Applied to weights with two or more dimensions only, never to norms and biases.
        momentum: Momentum of SGD; AdamW's first beta is 0.9.
        epochs: Length in passes over the data; may be fractional. With `time_budget_s` it is an upper limit.
        time_budget_s: Wall time in seconds; the number of steps is fixed once, from a timed probe.
        batch_size: Images per process; `n` processes make a global batch of `n * batch_size`.
        schedule: `"cosine"` (linear warm-up, then half a cosine), `"onecycle"` (triangle) or `"halving"`
            (steps, in equal parts of the training).
        halvings: How often `"halving"` halves the learning rate.
        warmup_fraction: Part of all steps spent warming up.
        final_lr_fraction: Learning rate of the last step, as a part of `lr`.
        label_smoothing: Probability spread over all classes.
        ema_decay: Per-step decay of the averaged weights; None trains without averaging.
        ema_every: Steps between two updates of the average (each then decays `ema_decay ** ema_every`).
        mixup: Alpha of mixup's beta distribution; 0 is off.
        cutmix: Alpha of cutmix's beta distribution; 0 is off. With both on, each batch draws one of them.
            Leave both at 0 where the augment callable already mixes.
        clip_norm: Largest global gradient norm; None is off.
        balanced: Draw every class equally often (with replacement).
        image_schedule: `((until, size), ...)`: up to that part of training, batches are resized to
            `size` pixels squared (progressive learning); after the last entry, full size.
        bf16: `"auto"` times both precisions and keeps the faster; True or False decide.
        channels_last: Keep activations in NHWC order, which is the faster one on processors.
        distill_alpha: Weight of the teacher's loss; the labels get the rest.
        distill_temperature: Temperature of the teacher's soft answers.
        seed: Decides order, augmentation and dropout.
        threads: Processor threads; None takes `OMP_NUM_THREADS` or all cores.
        eval_every: Epochs between validations; None keeps their cost under 3 % of the time.
        checkpoint_every_s: Seconds between two checkpoints; 0 writes one after every step.

    >>> Recipe(epochs=5).optimizer
    'sgd'
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    epochs: float | None = None
    time_budget_s: float | None = None
    batch_size: int = 128
    schedule: Literal["cosine", "onecycle", "halving"] = "cosine"
    halvings: int = 4
    warmup_fraction: float = 0.1
    final_lr_fraction: float = 0.0
    label_smoothing: float = 0.1
    ema_decay: float | None = 0.998
    ema_every: int = 4
    mixup: float = 0.0
    cutmix: float = 0.0
    clip_norm: float | None = None
    balanced: bool = False
    image_schedule: tuple[tuple[float, int], ...] = ()
    bf16: Literal["auto"] | bool = "auto"
    channels_last: bool = True
    distill_alpha: float = 0.5
    distill_temperature: float = 2.0
    seed: int = 0
    threads: int | None = None
    eval_every: int | None = None
    checkpoint_every_s: float = 15.0

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with.

        Raises:
            UsageError: A value is out of its range, or neither a length nor a budget is given.
        """
        for name, known in (("optimizer", ("sgd", "adamw")), ("schedule", ("cosine", "onecycle", "halving"))):
            value = getattr(self, name)
            if value not in known:
                hint = close_matches(str(value), known)
                raise UsageError(f"Recipe {name}={value!r} is unknown; expected one of {known}.{hint}")
        if self.halvings < 0:
            raise UsageError(f"Recipe halvings={self.halvings}; expected at least 0.")
        if self.bf16 not in ("auto", True, False):
            raise UsageError(f"Recipe bf16={self.bf16!r}; expected 'auto', True or False.")
        if self.epochs is None and self.time_budget_s is None:
            raise UsageError("Recipe has no length; give epochs, time_budget_s, or both (the shorter wins).")
        for name in ("lr", "epochs", "time_budget_s", "batch_size", "distill_temperature", "ema_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"Recipe {name}={value}; expected more than 0.")
        for name in ("warmup_fraction", "label_smoothing", "distill_alpha", "ema_decay", "final_lr_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"Recipe {name}={value}; expected a value from 0 to 1.")
        object.__setattr__(self, "image_schedule", tuple((float(u), int(s)) for u, s in self.image_schedule))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        fields = dataclasses.asdict(self)
        return {**fields, "image_schedule": [list(entry) for entry in self.image_schedule]}

    def thread_count(self) -> int:
        """Return the processor threads that a run of this recipe uses in one process."""
        if self.threads:
            return self.threads
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        if wanted.isdigit() and int(wanted) > 0:
            return int(wanted)
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
