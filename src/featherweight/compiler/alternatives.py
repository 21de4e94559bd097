"""Which of two forms a part of a network takes: as measured here, as a trial says, or as modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from featherweight.compiler.graph import Node


@dataclass(frozen=True)
class Alternatives:
    """What tuning knows, or tries.

    Attributes:
        seconds: measured, by key; the lesser of two keys wins where both are known.
        trial: None, or the form that every part takes while it is timed: "apart" (no fused block, no sparse
            layer), "joined" (everything fused and sparse), "planar" (sparse, not fused), or "thin" (the same
            with half of the nonzero weights, which tells how the time depends on them).
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    trial: str | None = None

    def prefers(self, second: str, first: str, modelled: bool) -> bool:
        """Say whether the form whose key is `second` is the quicker one.

        Args:
            second: key of one form.
            first: key of the other.
            modelled: the answer where they were not measured.
        """
        if second in self.seconds and first in self.seconds:
            return self.seconds[second] < self.seconds[first]
        return modelled


def count_time(node: Node, key: str, number: int) -> None:
    """Have the time of a node's step counted towards the form `key` of part `number` of the network."""
    node.attrs = {**node.attrs, "timed": (*node.attrs.get("timed", ()), (key, number))}
