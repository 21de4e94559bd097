"""Measured tiles: whole networks are built with each candidate of every layer and timed step by step.

The fastest candidate of each layer is kept in the cache, by processor and by the layer's shape.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.compiler.build import LIBRARY, Target, build_library, cache_folder, processor
from featherweight.compiler.session import Session
from featherweight.compiler.tiles import Tiles

if TYPE_CHECKING:
    from featherweight.compiler.driver import Compiled

CANDIDATES = 4
REPEATS = 20

Choices = dict[str, tuple[int, int]]


def tune(
    generate: Callable[[Tiles], Compiled],
    write: Callable[[Compiled, Path], None],
    target: Target,
    threads: int,
) -> Choices:
    """Return the fastest tile of each layer on this machine; what the cache knows is not measured again.

    Args:
        generate: makes the network's C with given choices.
        write: writes its files into a folder.
        target: to compile for; it runs on this machine.
        threads: of the compiled network.
    """
    from featherweight.compiler.driver import random_inputs

    store = cache_folder() / f"tiles-{processor()}-{target.name}-{threads}.json"
    known = _load(store)
    best: dict[str, tuple[float, tuple[int, int]]] = {}
    for rank in range(CANDIDATES):
        tiles = Tiles(known, rank)
        compiled = generate(tiles)
        keys = {step.tile_key for step in compiled.program.steps if step.tile_key} - known.keys()
        if not keys:
            break
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write(compiled, folder)
            build_library([folder / "model.c"], folder / LIBRARY, target, threads)
            session = Session(folder)
            seconds = session.time_steps(random_inputs(session), REPEATS)
            session.close()
        for step, time in zip(compiled.program.steps, seconds, strict=True):
            if step.tile_key in keys:
                tile = tiles.seen[step.tile_key]
                best[step.tile_key] = min(
                    best.get(step.tile_key, (float("inf"), (0, 0))), (time, (tile.rows, tile.vectors))
                )
    known = {**known, **{key: tile for key, (_, tile) in best.items()}}
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps(known, indent=0, sort_keys=True), encoding="utf-8")
    return known


def _load(store: Path) -> Choices:
    """Return the stored choices; a damaged file counts as none."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        return {str(key): (int(rows), int(vectors)) for key, (rows, vectors) in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
