"""The typed graph: nodes in order of execution, constants as numpy arrays, static shapes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TensorType:
    """Shape in elements and numpy data type of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        """Bytes of the row-major tensor."""
        return self.size * self.dtype.itemsize


@dataclass(eq=False)
class Node:
    """One operator. An absent optional input or output is the empty string, as in ONNX."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)

    def input(self, index: int) -> str:
        """Return the name of input `index`, or the empty string where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def output(self, index: int) -> str:
        """Return the name of output `index`, or the empty string where it is absent."""
        return self.outputs[index] if index < len(self.outputs) else ""


@dataclass
class Graph:
    """A network of one entry point.

    `types` knows every tensor, constants included. `inputs` and `outputs` are in the order of the file;
    an output may also be an input or a constant.
    """

    name: str
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    types: dict[str, TensorType]
    inputs: list[str]
    outputs: list[str]
    opset: int

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.types[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the data type of a tensor."""
        return self.types[name].dtype

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value of a constant, None for anything else (the empty name included)."""
        return self.constants.get(name)

    def producers(self) -> dict[str, Node]:
        """Map each computed tensor to the node that computes it."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def consumers(self) -> dict[str, list[Node]]:
        """Map each tensor to the nodes that read it, one entry a use."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    found.setdefault(name, []).append(node)
        return found

    def add_constant(self, hint: str, value: np.ndarray) -> str:
        """Store a constant under a free name that starts with `hint` and return the name."""
        name = self.free_name(hint)
        self.constants[name] = value
        self.types[name] = TensorType(tuple(value.shape), value.dtype)
        return name

    def free_name(self, hint: str) -> str:
        """Return a tensor name that no tensor has yet."""
        name, count = hint, 0
        while name in self.types:
            count += 1
            name = f"{hint}.{count}"
        return name

    def rename_uses(self, old: str, new: str) -> None:
        """Make every reader of `old`, the graph's outputs included, read `new`."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        self.outputs = [new if name == old else name for name in self.outputs]

    def remove_dead(self) -> None:
        """Drop nodes and constants that no output depends on."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(name in wanted for name in node.outputs):
                wanted.update(name for name in node.inputs if name)
                node.outputs = [name if name in wanted else "" for name in node.outputs]
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in wanted}
        alive = wanted | set(self.inputs)
        self.types = {name: kind for name, kind in self.types.items() if name in alive}


def sort_nodes(nodes: Iterable[Node], known: Iterable[str]) -> tuple[list[Node], list[Node]]:
    """Order nodes so that each follows what it reads.

    Args:
        nodes: in any order; ties keep it.
        known: tensors that exist before the first node.

    Returns:
        The sorted nodes and those that can never run: they read an unknown tensor or lie on a cycle.
    """
    nodes = list(nodes)
    ready = set(known) | {""}
    waiting: dict[str, list[int]] = {}
    missing = [0] * len(nodes)
    for index, node in enumerate(nodes):
        for name in set(node.inputs) - ready:
            waiting.setdefault(name, []).append(index)
            missing[index] += 1
    order = [index for index, count in enumerate(missing) if count == 0]
    done: list[Node] = []
    placed = set()
    while order:
        index = heapq.heappop(order)
        placed.add(index)
        done.append(nodes[index])
        for name in nodes[index].outputs:
            for reader in waiting.pop(name, []):
                missing[reader] -= 1
                if missing[reader] == 0:
                    heapq.heappush(order, reader)
    return done, [node for index, node in enumerate(nodes) if index not in placed]


def rewrite(graph: Graph, rule: Callable[[Graph, Node], bool]) -> bool:
    """Apply `rule` to every node once, in order, and drop what it left dead.

    Args:
        graph: changed in place.
        rule: edits the graph around a node and says whether it did.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in list(graph.nodes):
        changed |= rule(graph, node)
    if changed:
        graph.remove_dead()
    return changed
