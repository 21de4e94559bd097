"""Measured choices: whole networks are built in several forms and timed step by step.

The quickest tile of each layer is kept, and the time of each form of a part (a block fused or layer by layer,
a 1x1 layer dense or sparse), by processor and by shape. What is known is not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.compiler.alternatives import Alternatives
from featherweight.compiler.build import LIBRARY, Target, build_library, cache_folder, processor
from featherweight.compiler.session import Session
from featherweight.compiler.tiles import Tiles

if TYPE_CHECKING:
    from featherweight.compiler.driver import Compiled

TRIALS = (
    *((rank, "apart") for rank in range(4)),
    *((0, form) for form in ("joined", "planar", "thin")),
)
"""Rank of the tiles and form of the parts of each build."""

REPEATS = 20


@dataclass
class Measured:
    """What was measured: tiles (rows, vectors) of layers, and seconds of forms, both by key."""

    tiles: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def choices(self) -> Tiles:
        """Return the choices that follow."""
        return Tiles(self.tiles, alternatives=Alternatives(self.seconds))


def tune(
    generate: Callable[[Tiles], Compiled],
    write: Callable[[Compiled, Path], None],
    target: Target,
    threads: int,
) -> Tiles:
    """Return the quickest tiles and forms on this machine.

    Args:
        generate: makes the network's C with given choices.
        write: writes its files into a folder.
        target: to compile for; it runs on this machine.
        threads: of the compiled network.
    """
    store = cache_folder() / f"measured-{processor()}-{target.name}-{threads}.json"
    known = load(store)
    tiles: dict[str, tuple[float, tuple[int, int]]] = {}
    seconds: dict[str, float] = {}
    for rank, form in TRIALS:
        choices = Tiles(known.tiles, rank, alternatives=Alternatives(known.seconds, form))
        compiled = generate(choices)
        steps = compiled.program.steps
        wanted = {step.tile_key for step in steps if step.tile_key} - known.tiles.keys()
        forms = {key for step in steps for key, _ in step.timed} - known.seconds.keys() - seconds.keys()
        if not forms and not (wanted and form == "apart"):
            continue
        times = _time(compiled, write, target, threads)
        sums: dict[tuple[str, int], float] = defaultdict(float)
        for step, time in zip(steps, times, strict=True):
            if step.tile_key in wanted:
                tile = choices.seen[step.tile_key]
                best = tiles.get(step.tile_key, (float("inf"), (0, 0)))
                tiles[step.tile_key] = min(best, (time, (tile.rows, tile.vectors)))
            for part in step.timed:
                sums[part] += time
        for (key, _), time in sums.items():
            seconds[key] = min(seconds.get(key, float("inf")), time)
    known.tiles |= {key: tile for key, (_, tile) in tiles.items()}
    known.seconds |= {key: time for key, time in seconds.items() if key not in known.seconds}
    store.parent.mkdir(parents=True, exist_ok=True)
    content = {"tiles": known.tiles, "seconds": known.seconds}
    store.write_text(json.dumps(content, indent=0, sort_keys=True), encoding="utf-8")
    return known.choices()


def _time(
    compiled: Compiled, write: Callable[[Compiled, Path], None], target: Target, threads: int
) -> list[float]:
    """Build a network and return the seconds of each step."""
    from featherweight.compiler.driver import random_inputs

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(compiled, folder)
        build_library([folder / "model.c"], folder / LIBRARY, target, threads)
        session = Session(folder)
        times = session.time_steps(random_inputs(session), REPEATS)
        session.close()
    return times


def load(store: Path) -> Measured:
    """Return what a file holds; a damaged file counts as empty."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return Measured(
            {str(key): (int(rows), int(vectors)) for key, (rows, vectors) in content["tiles"].items()},
            {str(key): float(value) for key, value in content["seconds"].items()},
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return Measured()
