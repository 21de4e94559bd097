"""Merge parallel convolutions: a sum of terms that are linear in one tensor is one convolution.

conv3x3(x) + conv1x1(x) + x * scale, as re-parameterised networks train it (RepVGG, MobileOne, FastViT), has
the weights of the 3x3 with those of the 1x1 and the scale added to the taps that they meet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from featherweight.compiler.graph import Graph, Node, rewrite
from featherweight.compiler.passes.fold_norm import channel_values, fold_scales
from featherweight.compiler.windows import Window, conv_window

DEPTH = 8
"""Operators from a sum to its source, at most."""


@dataclass(frozen=True)
class _Term:
    """`factor` (C,) times a convolution of the source, or times the source itself."""

    conv: Node | None
    factor: np.ndarray


@dataclass(frozen=True)
class _Sum:
    """Terms of one source, and one value a channel (C,)."""

    source: str
    terms: tuple[_Term, ...]
    bias: np.ndarray

    def scaled(self, factor: np.ndarray | float) -> _Sum:
        terms = tuple(replace(term, factor=term.factor * factor) for term in self.terms)
        return _Sum(self.source, terms, self.bias * factor)


def merge_parallel(graph: Graph) -> None:
    """Merge until no sum of parallel convolutions is left."""
    while rewrite(graph, _merge):
        fold_scales(graph)


def _merge(graph: Graph, node: Node) -> bool:
    if node.op not in ("Add", "Sub") or not _is_image(graph, node.outputs[0]):
        return False
    for total in _combine(graph, node):
        convs = [term.conv for term in total.terms if term.conv is not None]
        if not convs:
            continue
        base = max(convs, key=lambda conv: graph.constants[conv.inputs[1]].size)
        taps = _Taps(graph, base)
        if all(taps.add(term) for term in total.terms):
            inputs = [
                total.source,
                graph.add_constant(base.inputs[1], taps.weight.astype(np.float32)),
                graph.add_constant(base.name + ".bias", total.bias.astype(np.float32)),
            ]
            merged = Node("Conv", base.name, inputs, list(node.outputs), base.attrs)
            graph.nodes[graph.nodes.index(node)] = merged
            return True
    return False


def _is_image(graph: Graph, name: str) -> bool:
    kind = graph.types[name]
    return len(kind.shape) == 4 and kind.dtype == np.float32


def _combine(graph: Graph, node: Node, depth: int = 0) -> list[_Sum]:
    """Return the sums or differences that a node computes: one for each source that its operands share."""
    if len({graph.shape(name) for name in [*node.inputs, *node.outputs]}) > 1:
        return []
    if any(graph.constant(name) is not None for name in node.inputs):
        return []
    left, right = (_read(graph, name, depth + 1) for name in node.inputs)
    sign = -1.0 if node.op == "Sub" else 1.0
    return [
        _Sum(a.source, a.terms + b.scaled(sign).terms, a.bias + sign * b.bias)
        for a in left
        for b in right
        if a.source == b.source
    ]


def _read(graph: Graph, name: str, depth: int) -> list[_Sum]:
    """Return a tensor as sums of linear terms, one for each possible source; the last one is itself.

    A convolution or a sum counts only where nothing else reads it: else it would be computed twice.
    """
    channels = graph.shape(name)[1]
    one, zero = np.ones(channels), np.zeros(channels)
    found = [_Sum(name, (_Term(None, one),), zero)]
    node = graph.producers().get(name)
    if node is None or name in graph.outputs or depth > DEPTH:
        return found
    constants = [graph.constant(other) for other in node.inputs]
    alone = len(graph.consumers()[name]) == 1
    if node.op == "Conv" and alone and _is_image(graph, node.inputs[0]):
        bias = constants[2] if node.input(2) else zero
        if constants[1] is not None and bias is not None:
            found.insert(0, _Sum(node.inputs[0], (_Term(node, one),), bias.astype(np.float64)))
    elif node.op in ("Add", "Sub") and alone and all(value is None for value in constants):
        found = [*_combine(graph, node, depth), *found]
    elif node.op in ("Add", "Sub", "Mul", "Div"):
        found = [*_affine(graph, node, depth), *found]
    return found


def _affine(graph: Graph, node: Node, depth: int) -> list[_Sum]:
    """Read what one constant a channel scales or shifts."""
    constants = [graph.constant(name) for name in node.inputs]
    side = 0 if constants[0] is not None else 1
    inner, value = node.inputs[1 - side], constants[side]
    shape = graph.shape(node.outputs[0])
    if value is None or graph.shape(inner) != shape or (side == 0 and node.op in ("Sub", "Div")):
        return []
    values = channel_values(value, 4, shape[1])
    if values is None or (node.op == "Div" and not values.all()):
        return []
    sums = _read(graph, inner, depth + 1)
    if node.op in ("Mul", "Div"):
        return [own.scaled(values if node.op == "Mul" else 1.0 / values) for own in sums]
    shift = values if node.op == "Add" else -values
    return [replace(own, bias=own.bias + shift) for own in sums]


class _Taps:
    """The weights of the largest convolution, to which the others are added."""

    def __init__(self, graph: Graph, base: Node) -> None:
        self.graph, self.base = graph, base
        self.window = self._window(base)
        self.weight = np.zeros(graph.shape(base.inputs[1]))

    def _window(self, conv: Node) -> Window:
        graph = self.graph
        sides = (graph.shape(name)[2:] for name in (conv.inputs[1], conv.inputs[0], conv.outputs[0]))
        return conv_window(conv.attrs, *sides)

    def add(self, term: _Term) -> bool:
        """Add a term, and say whether its taps are among the base's."""
        own = self.window
        outputs, narrow = self.weight.shape[:2]
        if term.conv is None:
            groups = self.base.attrs.get("group", 1)
            if set(own.strides) != {1} or own.inputs != own.outputs or outputs != narrow * groups:
                return False
            value = np.zeros((outputs, narrow, 1, 1))
            value[np.arange(outputs), np.arange(outputs) % narrow] = 1.0
            before, step = (0, 0), (1, 1)
        else:
            window = self._window(term.conv)
            value = self.graph.constants[term.conv.inputs[1]].astype(np.float64)
            if value.shape[:2] != (outputs, narrow) or window.strides != own.strides:
                return False
            before, step = window.before, window.dilations
        places = []
        for axis in range(2):
            at = [own.before[axis] - before[axis] + tap * step[axis] for tap in range(value.shape[2 + axis])]
            if any(place % own.dilations[axis] for place in at):
                return False
            taps = [place // own.dilations[axis] for place in at]
            if min(taps) < 0 or max(taps) >= self.weight.shape[2 + axis]:
                return False
            places.append(taps)
        self.weight[:, :, *np.ix_(*places)] += value * term.factor[:, None, None, None]
        return True
