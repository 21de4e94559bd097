"""Choose the planar regions: 1x1 convolutions with mostly zero weights, and the layers between them.

There activations lie channel by channel and vectors run over pixels. A node of such a region gets the
attribute `planar`: "sparse", "dense", "depthwise", "group" or "pool". Which nodes do is a minimum cut: every
layer has a cost in either layout, every tensor between two layouts that of its conversion ("Fast Sparse
ConvNets", Elsen et al., 2019: activations stay channel-first from the stem to the pool).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from featherweight.compiler.alternatives import Alternatives, count_time
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.pack_sparse import plan_stripes
from featherweight.compiler.passes.cut import cheapest_labels
from featherweight.compiler.passes.layout import FOLLOWERS, conv_border, is_depthwise, is_pixel_conv
from featherweight.compiler.tiles import registers
from featherweight.compiler.vector_expressions import is_vector

MIN_ZEROS = 0.2
"""Networks without a layer of more zeros are not looked at."""

FORBIDDEN = 1e15
"""Cycles that no network has."""

MIN_PIXELS, MAX_TAPS, MAX_COLUMNS = 16, 25, 256

PIXEL_CYCLES = 1.07
"""Cycles of a vector's multiply-add in a dense product, channels last; measured, as are those below."""

PIXEL_DEPTHWISE_CYCLES, PLANAR_DEPTHWISE_CYCLES = 2.0, 1.6
GATHER_CYCLES, ELEMENT_CYCLES, CONVERT_CYCLES = 2.5, 2.0, 27.0
"""A vector gathered for the first layer, one through a vector loop, and one moved to the other layout."""


def mark_planar(graph: Graph, vector: int, alternatives: Alternatives | None = None) -> None:
    """Mark the nodes in place: after element-wise operators are grouped, before they join convolutions.

    Args:
        graph: the network.
        vector: floats of a vector register of the target.
        alternatives: what was measured of 1x1 layers in either form.
    """
    alternatives = alternatives or Alternatives()
    pointwise = [node for node in graph.nodes if is_pointwise(graph, node)]
    if not any(zeros_of(graph, node) >= MIN_ZEROS for node in pointwise):
        return
    if alternatives.trial == "thin":
        for node in pointwise:
            _thin(graph, node)
    kinds = {id(node): _kind(graph, node) for node in graph.nodes}
    nodes = {id(node): node for node in graph.nodes if kinds[id(node)]}
    costs = {
        number: [_cost(graph, node, "", vector), _cost(graph, node, kinds[number], vector)]
        for number, node in nodes.items()
    }
    for number, node in enumerate(pointwise):
        layer = Layer(graph, node, vector, costs[id(node)][0], costs[id(node)][1])
        costs[id(node)][1] = layer.sparse_cycles(alternatives)
        if alternatives.trial:
            # A layer that costs nothing in one form draws all around it.
            apart = alternatives.trial == "apart"
            costs[id(node)] = [0.0, FORBIDDEN] if apart else [FORBIDDEN, 0.0]
        node.attrs = {**node.attrs, "facts": layer.facts(alternatives), "layer": (layer.key, number)}
    edges = _edges(graph, nodes, costs, vector)
    chosen = cheapest_labels({number: (pair[0], pair[1]) for number, pair in costs.items()}, edges)
    for number in chosen:
        nodes[number].attrs = {**nodes[number].attrs, "planar": kinds[number]}
    for node in pointwise:
        key, number = node.attrs["layer"]
        form = f"z{zeros_of(graph, node):.3f}" if "planar" in node.attrs else "dense"
        count_time(node, f"{key}-{form}", number)


def _thin(graph: Graph, node: Node) -> None:
    """Zero every other nonzero weight."""
    weight = graph.constants[node.inputs[1]].copy()
    flat = weight.reshape(-1)
    flat[np.flatnonzero(flat)[::2]] = 0
    graph.constants[node.inputs[1]] = flat.reshape(weight.shape)


@dataclass(frozen=True)
class Layer:
    """A 1x1 layer that may run sparse, with its modelled cycles in either form."""

    graph: Graph
    node: Node
    vector: int
    dense: float
    sparse: float

    @property
    def key(self) -> str:
        """What names the layer's shape in the cache of measured times."""
        filters, channels = self.graph.shape(self.node.inputs[1])[:2]
        n, _, h, w = self.graph.shape(self.node.inputs[0])
        return f"1x1-{self.vector}-{n}x{channels}x{filters}x{h}x{w}"

    def sparse_cycles(self, alternatives: Alternatives) -> float:
        """Return the cycles of the sparse form, in proportion to the dense form's where both were timed."""
        zeros = zeros_of(self.graph, self.node)
        dense = alternatives.seconds.get(f"{self.key}-dense")
        sparse = alternatives.seconds.get(f"{self.key}-z{zeros:.3f}")
        return self.dense * sparse / dense if dense and sparse else self.sparse

    def facts(self, alternatives: Alternatives) -> dict[str, float | str]:
        """Return the share of zeros, and that from which on the sparse form is quicker."""
        prefix = f"{self.key}-z"
        points = {
            float(key.removeprefix(prefix)): seconds
            for key, seconds in alternatives.seconds.items()
            if key.startswith(prefix)
        }
        dense = alternatives.seconds.get(f"{self.key}-dense")
        by = "measured" if dense and len(points) > 1 else "model"
        if by == "model":
            none = np.zeros_like(self.graph.constants[self.node.inputs[1]])
            zeros = zeros_of(self.graph, self.node)
            points = {zeros: self.sparse, 1.0: sparse_cycles(self.graph, self.node, none, self.vector)}
            dense = self.dense
        low, high = min(points), max(points)
        slope = (points[low] - points[high]) / (high - low) if high > low else 0.0
        even = high - (dense - points[high]) / slope if slope > 0 else 1.0
        return {
            "zeros": round(zeros_of(self.graph, self.node), 3),
            "break_even_zeros": round(min(max(even, 0.0), 1.0), 3),
            "break_even_by": by,
        }


def planar_tensors(graph: Graph) -> frozenset[str]:
    """Return the tensors whose planes are whole vectors."""
    marked = [node for node in graph.nodes if node.attrs.get("planar") not in (None, "pool")]
    return frozenset(name for node in marked for name in node.outputs if name)


def is_pointwise(graph: Graph, node: Node) -> bool:
    """Say whether a node is a dense-layout 1x1 convolution of a whole map, which could run sparse."""
    if node.op != "Conv" or not is_pixel_conv(graph, node):
        return False
    weight = graph.constants[node.inputs[1]]
    plain = weight.shape[2:] == (1, 1) and node.attrs.get("group", 1) == 1
    if not plain or set(node.attrs.get("strides") or [1]) != {1} or any(conv_border(graph, node)):
        return False
    return math.prod(graph.shape(node.inputs[0])[2:]) >= MIN_PIXELS


def zeros_of(graph: Graph, node: Node) -> float:
    """Return the share of zeros of a convolution's weights."""
    return float((graph.constants[node.inputs[1]] == 0).mean())


def sparse_cycles(graph: Graph, node: Node, weight: np.ndarray, vector: int) -> float:
    """Return the modelled cycles of a 1x1 layer with these weights in a planar region."""
    n, _, rows, columns = graph.shape(node.outputs[0])
    plan = plan_stripes(weight[:, :, 0, 0], -(-rows * columns // vector), vector, registers(vector))
    return n * plan.cycles


def _kind(graph: Graph, node: Node) -> str:
    """Return how a node would run in a planar region, the empty string where it cannot."""
    if node.op == "Conv" and is_pixel_conv(graph, node):
        if is_pointwise(graph, node):
            return "sparse"
        strides = set(node.attrs.get("strides") or [1])
        if strides not in ({1}, {2}) or set(node.attrs.get("dilations") or [1]) != {1}:
            return ""
        filters, depth, *kernel = graph.shape(node.inputs[1])
        if is_depthwise(graph, node):
            return "depthwise" if math.prod(kernel) <= MAX_TAPS else ""
        few = depth * math.prod(kernel) <= MAX_COLUMNS and math.prod(kernel) <= MAX_TAPS
        large = math.prod(graph.shape(node.outputs[0])[2:]) >= MIN_PIXELS
        return "dense" if few and large and node.attrs.get("group", 1) == 1 and filters >= 4 else ""
    if not _is_map(graph, node.outputs[0]) and not _is_map(graph, node.input(0)):
        return ""
    if node.op == "Group" and is_vector(graph, node.attrs["body"]) and _is_map(graph, node.outputs[0]):
        images = all(len(graph.shape(name)) in (0, 4) or graph.types[name].size == 1 for name in node.inputs)
        return "group" if images else ""
    mean = node.op == "GlobalAveragePool" or (
        node.op == "ReduceMean" and bool(node.attrs.get("keepdims", 1)) and _axes(graph, node) == {2, 3}
    )
    return "pool" if mean and _is_map(graph, node.input(0)) else ""


def _axes(graph: Graph, node: Node) -> set[int]:
    value = graph.constant(node.input(1)) if node.input(1) else np.array(node.attrs.get("axes") or [])
    return set() if value is None else {int(axis) % 4 for axis in value.reshape(-1)}


def _is_map(graph: Graph, name: str) -> bool:
    """Say whether a tensor is a float32 image of some size."""
    kind = graph.types.get(name)
    return (
        kind is not None
        and len(kind.shape) == 4
        and kind.dtype == np.float32
        and math.prod(kind.shape[2:]) >= MIN_PIXELS
    )


def _cost(graph: Graph, node: Node, kind: str, vector: int) -> float:
    """Return the cycles of a node: in a planar region where `kind` is given, else channels last."""
    n, filters, rows, columns = graph.shape(node.outputs[0])
    pixels = n * rows * columns
    if node.op != "Conv":
        return graph.types[node.inputs[0]].size / vector * ELEMENT_CYCLES
    weight = graph.constants[node.inputs[1]]
    taps = math.prod(weight.shape[2:])
    blocks = -(-filters // vector)
    if kind == "sparse":
        return sparse_cycles(graph, node, weight, vector)
    if kind == "depthwise":
        return n * filters * rows * -(-columns // vector) * taps * PLANAR_DEPTHWISE_CYCLES
    if kind == "dense":
        gathered = n * weight.shape[1] * rows * -(-columns // vector) * taps * GATHER_CYCLES
        return pixels * weight.size / vector * PIXEL_CYCLES + gathered
    if is_depthwise(graph, node):
        return pixels * blocks * taps * PIXEL_DEPTHWISE_CYCLES
    return pixels * blocks * weight.shape[1] * taps * PIXEL_CYCLES


def _edges(
    graph: Graph, nodes: Mapping[int, Node], costs: dict[int, list[float]], vector: int
) -> list[tuple[int, int, float]]:
    """Return the tensors between nodes of a choice; add conversions from and to other nodes to `costs`."""
    producers = graph.producers()
    edges: list[tuple[int, int, float]] = []
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            if not name or graph.constant(name) is not None or not _is_map(graph, name):
                continue
            price = graph.types[name].size / vector * CONVERT_CYCLES
            producer = producers.get(name)
            made, read = producer is not None and id(producer) in nodes, id(node) in nodes
            if made and read:
                edges.append((id(producer), id(node), price))
            elif read:
                # The file's inputs and what plain operators make lie row-major.
                follows = producer is not None and (producer.op in FOLLOWERS or producer.op == "Conv")
                costs[id(node)][1 if follows else 0] += price
            elif made:
                follows = node.op in FOLLOWERS or node.op == "Conv"
                costs[id(producer)][1 if follows else 0] += price
    return edges
