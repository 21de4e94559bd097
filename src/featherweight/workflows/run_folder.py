"""The run folder: where `fit` keeps its configuration, its progress and what it produced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from featherweight.errors import CheckpointError, UsageError
from featherweight.files import atomic_write_json


class RunFolder:
    """A folder `runs/<name>/` with `config.json` (what was asked for) and `progress.json` (what is done).

    Args:
        path: the folder.
        config: what was asked for, as plain values.
        resume: continue a run that stands there.

    Raises:
        UsageError: the folder already holds a run and `resume` is off, or its configuration differs.
        CheckpointError: the files of the run cannot be read.
    """

    def __init__(self, path: Path, config: dict[str, Any], resume: bool = False) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        stored = self._read("config.json")
        if stored is not None and not resume:
            raise UsageError(
                f"{self.path} already holds a run. Continue it with --resume, "
                "or choose another folder with --out."
            )
        if stored is not None and stored != self.config:
            changed = sorted(
                key for key in {*stored, *self.config} if stored.get(key) != self.config.get(key)
            )
            raise UsageError(
                f"{self.path} was started with other settings ({', '.join(changed)}). "
                "Resume with the same ones, or choose another folder with --out."
            )
        self.progress: dict[str, Any] = self._read("progress.json") or {}
        atomic_write_json(self.path / "config.json", self.config)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. Start again in another folder."
            ) from error

    def save(self, **entries: Any) -> None:
        """Store entries of the progress so that a resumed run finds them."""
        self.progress.update(entries)
        atomic_write_json(self.path / "progress.json", self.progress)

    @property
    def spent_s(self) -> float:
        """Wall time in seconds of the finished steps, over all resumptions."""
        return sum(self.progress.get("wall_s", {}).values())

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; its wall time in seconds adds up over resumptions."""
        start = monotonic()
        try:
            yield
        finally:
            wall_s = dict(self.progress.get("wall_s", {}))
            wall_s[name] = round(wall_s.get(name, 0.0) + monotonic() - start, 3)
            self.save(wall_s=wall_s)


def default_folder(name: str, resume: bool = False) -> Path:
    """Return the first free one of `runs/<name>`, `runs/<name>-2` and so on; the last taken one to resume.

    Raises:
        UsageError: there is no run to resume, or there are too many runs of this name.
    """
    taken = None
    for number in range(1, 10_000):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not (folder / "config.json").exists():
            break
        taken = folder
    else:
        raise UsageError(f"runs/ holds 10,000 runs of {name}. Choose a folder with --out.")
    if not resume:
        return folder
    if taken is None:
        raise UsageError(f"No run of {name} to resume in runs/. Name its folder with --out.")
    return taken
