"""Live progress of a run: a callable takes event dicts; the default draws a bar when stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ProgressCallback = Callable[[dict[str, Any]], None]
"""Called with one dict per event. `event` is one of

- `plan`: total_steps, steps_per_epoch, bf16, eval_every, threads, world
- `step` (at most five a second): step, total_steps, epoch, loss, lr, eta_s, images_per_s
- `epoch`: the line that also goes into `metrics.jsonl`
- `checkpoint`: step
- `done`: wall_s, val_accuracy (the data's own score where images have no labels)
"""


def silent(event: dict[str, Any]) -> None:
    """Ignore every event."""


class RichProgress:
    """Draws one bar with loss, validation score and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console or Console(stderr=True),
        )
        self._task = self._bar.add_task("train", total=None, note="")
        self._score = ""

    def __call__(self, event: dict[str, Any]) -> None:
        """Draw one event."""
        kind = event["event"]
        if kind == "plan":
            self._bar.start()
            self._bar.update(self._task, total=event["total_steps"])
        elif kind == "epoch" and event.get("val_accuracy") is not None:
            self._score = f"  val {event['val_accuracy']:.1%}"
        elif kind == "epoch" and event.get("val_psnr") is not None:
            self._score = f"  val {event['val_psnr']:.2f} dB"
        elif kind == "step":
            note = f"loss {event['loss']:.4g}{self._score}  {event['eta_s']:.0f} s left"
            self._bar.update(self._task, completed=event["step"], note=note)
        elif kind == "done":
            self.close()

    def close(self) -> None:
        """Leave the terminal in order; safe to call twice."""
        self._bar.stop()


def default_progress() -> ProgressCallback:
    """Return a bar on stderr if that is a terminal, and silence if not."""
    return RichProgress() if sys.stderr.isatty() else silent
