"""Find 1x1 convolutions with mostly zero weights, and the depthwise ones between them: they run row-major.

Such a node gets the attribute `planar`: "sparse" or "depthwise".
"""

from __future__ import annotations

import math

from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.passes.layout import conv_border, is_depthwise, is_pixel_conv

MIN_ZEROS = 0.7
"""Share of zeros from which a walk over the others beats the dense kernel."""

MIN_PIXELS, MAX_TAPS = 16, 25


def mark_planar(graph: Graph) -> None:
    """Mark the nodes in place: after element-wise operators are grouped, before they join convolutions."""
    producers = graph.producers()
    for node in graph.nodes:
        if node.op != "Conv" or not is_pixel_conv(graph, node):
            continue
        if _is_sparse(graph, node):
            node.attrs = {**node.attrs, "planar": "sparse"}
        elif is_depthwise(graph, node) and _fits_planar(graph, node):
            source = producers.get(node.inputs[0])
            while source is not None and source.op == "Group":
                computed = [name for name in source.inputs if graph.constant(name) is None]
                source = producers.get(computed[0]) if len(computed) == 1 else None
            if source is not None and "planar" in source.attrs:
                node.attrs = {**node.attrs, "planar": "depthwise"}


def _is_sparse(graph: Graph, node: Node) -> bool:
    weight = graph.constants[node.inputs[1]]
    plain = weight.shape[2:] == (1, 1) and node.attrs.get("group", 1) == 1
    if not plain or set(node.attrs.get("strides") or [1]) != {1} or any(conv_border(graph, node)):
        return False
    pixels = math.prod(graph.shape(node.inputs[0])[2:])
    # Whole vectors behind the last plane are read, which a caller's memory need not have.
    return pixels >= MIN_PIXELS and node.inputs[0] not in graph.inputs and (weight == 0).mean() >= MIN_ZEROS


def _fits_planar(graph: Graph, node: Node) -> bool:
    strides, dilations = set(node.attrs.get("strides") or [1]), set(node.attrs.get("dilations") or [1])
    taps = math.prod(graph.shape(node.inputs[1])[2:])
    return strides in ({1}, {2}) and dilations == {1} and taps <= MAX_TAPS
