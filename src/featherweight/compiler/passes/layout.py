"""Choose which tensors lie channels last (`pixel`) and which row-major (`plain`), and where borders are kept.

Convolutions decide: their results are pixel. Operators that work well in either layout follow their inputs, so
that conversions stand only at the ends of a region.
"""

from __future__ import annotations

import numpy as np

from featherweight.compiler.convert import NO_BORDER, Border
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.windows import conv_window

FOLLOWERS = frozenset(
    "Group MaxPool AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceSum Concat Split Slice "
    "Resize Pad DepthToSpace SpaceToDepth Softmax Gather".split()
)


def choose_layout(graph: Graph) -> frozenset[str]:
    """Return the tensors that lie in the pixel layout."""
    pixel: set[str] = set()
    for node in graph.nodes:
        if node.op == "Conv":
            chosen = is_pixel_conv(graph, node)
        else:
            chosen = node.op in FOLLOWERS and _follows(graph, node, pixel)
        if chosen:
            pixel.update(name for name in node.outputs if name)
    return frozenset(pixel)


def is_pixel_conv(graph: Graph, node: Node) -> bool:
    """Say whether a convolution is two-dimensional float32 with fixed weights."""
    known = all(graph.constant(name) is not None for name in node.inputs[1:3] if name)
    return known and _is_image(graph, node.inputs[0]) and _is_image(graph, node.outputs[0])


def _is_image(graph: Graph, name: str) -> bool:
    kind = graph.types[name]
    return len(kind.shape) == 4 and kind.dtype == np.float32 and 0 not in kind.shape


def _follows(graph: Graph, node: Node, pixel: set[str]) -> bool:
    if not any(name in pixel for name in node.inputs):
        return False
    if any(not _is_image(graph, name) for name in node.outputs if name):
        return False
    if node.op == "MaxPool":
        return len(node.outputs) == 1 or not node.outputs[1]
    if node.op.startswith("Reduce"):
        return reduces_space(graph, node)
    return node.op != "Gather" or (node.attrs.get("axis", 0) % 4 == 1 and graph.constant(node.inputs[1]) is not None)


def reduces_space(graph: Graph, node: Node) -> bool:
    """Say whether a reduction runs over rows and columns and keeps them as axes of size one."""
    axes = node.attrs.get("axes")
    if axes is None and node.input(1):
        value = graph.constant(node.inputs[1])
        axes = None if value is None else value.reshape(-1).tolist()
    return bool(node.attrs.get("keepdims", 1)) and axes is not None and {axis % 4 for axis in axes} == {2, 3}


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Say whether every channel is convolved with one filter of its own."""
    shape, filters = graph.shape(node.inputs[0]), graph.shape(node.inputs[1])
    return node.attrs.get("group", 1) == shape[1] == filters[0] and shape[1] > 1


def wanted_borders(graph: Graph, pixel: frozenset[str]) -> dict[str, Border]:
    """Return for each tensor the border of zeros that its dense convolutions read."""
    borders: dict[str, Border] = {}
    for node in graph.nodes:
        if node.op != "Conv" or node.outputs[0] not in pixel or is_depthwise(graph, node):
            continue
        border = conv_border(graph, node)
        old = borders.get(node.inputs[0], NO_BORDER)
        if any(border) and node.inputs[0] in pixel:
            borders[node.inputs[0]] = tuple(map(max, old, border))  # type: ignore[assignment]
    return borders


def conv_border(graph: Graph, node: Node) -> Border:
    """Return the zeros around a convolution's input."""
    window = conv_window(
        node.attrs,
        graph.shape(node.inputs[1])[2:],
        graph.shape(node.inputs[0])[2:],
        graph.shape(node.outputs[0])[2:],
    )
    return (window.before[0], window.before[1], window.after[0], window.after[1])
