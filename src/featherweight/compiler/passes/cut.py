"""Two-way labelling of a graph at the least cost: a minimum cut (Ford and Fulkerson, paths by breadth)."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

SOURCE, SINK = "source", "sink"
ENOUGH = 1e-6
"""Capacities below this count as used up."""


def cheapest_labels(costs: Mapping[T, tuple[float, float]], edges: Iterable[tuple[T, T, float]]) -> set[T]:
    """Return the items that get the second label when the sum of all costs is least.

    Args:
        costs: of each item with the first and with the second label.
        edges: pairs of items, and what it costs if their labels differ.

    >>> sorted(cheapest_labels({"a": (5, 0), "b": (1, 2), "c": (0, 9)}, [("a", "b", 3), ("b", "c", 1)]))
    ['a', 'b']
    """
    room: dict[tuple, dict[tuple, float]] = defaultdict(lambda: defaultdict(float))
    source, sink = (SOURCE,), (SINK,)
    for item, (first, second) in costs.items():
        # An item on the sink's side has the second label and cuts the edge from the source: what it costs.
        room[source][("item", item)] += second
        room[("item", item)][sink] += first
    for left, right, cost in edges:
        room[("item", left)][("item", right)] += cost
        room[("item", right)][("item", left)] += cost
    while path := _path(room, source, sink):
        least = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= least
            room[b][a] += least
    reached = _reach(room, source)
    return {item for item in costs if ("item", item) not in reached}


def _reach(room: Mapping[tuple, Mapping[tuple, float]], start: tuple) -> dict[tuple, tuple]:
    """Return what can still be reached, each with where from, nearest first."""
    found = {start: start}
    waiting = deque([start])
    while waiting:
        here = waiting.popleft()
        for there, left in room[here].items():
            if left > ENOUGH and there not in found:
                found[there] = here
                waiting.append(there)
    return found


def _path(room: Mapping[tuple, Mapping[tuple, float]], start: tuple, end: tuple) -> list[tuple[tuple, tuple]]:
    came = _reach(room, start)
    path, here = [], end
    while here in came and here != start:
        path.append((came[here], here))
        here = came[here]
    return path
