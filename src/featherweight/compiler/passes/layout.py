"""Choose which tensors lie channels last (`pixel`) and which row-major (`plain`), and where borders are kept.

Convolutions decide: their results are pixel. Operators that work well in either layout follow their inputs,
so that conversions stand only at the ends of a region.
"""

from __future__ import annotations

import numpy as np

from featherweight.compiler.convert import NO_BORDER, Border
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.windows import conv_window

FOLLOWERS = frozenset(
    [
        "Group",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "ReduceMean",
        "ReduceMax",
        "ReduceSum",
        "Concat",
        "Split",
        "Slice",
        "Resize",
        "DequantizeLinear",
        "Pad",
        "DepthToSpace",
        "SpaceToDepth",
        "Softmax",
        "Gather",
        "InstanceNormalization",
        "GroupNormalization",
    ]
)


BYTE_FOLLOWERS = frozenset({"Concat", "Split", "Slice", "Gather", "Resize", "DepthToSpace", "SpaceToDepth"})
MAKERS = frozenset({"Conv", "Group", "Concat", "QConv"})
"""Operators that can write a part of a wider map: they keep off the channels behind their own."""

FRAMED = frozenset({"Conv", "Group", "Concat", "MaxPool", "AveragePool"})
"""Operators that can leave room for a border around their result."""

INTEGER = frozenset({"QConv", "QTable", "QAdd", "QMul", "QGlobalPool", "QPool", "QConcat"})


def choose_layout(graph: Graph) -> frozenset[str]:
    """Return the tensors that lie in the pixel layout."""
    pixel: set[str] = set()
    consumers = graph.consumers()
    for node in graph.nodes:
        if "planar" in node.attrs:
            chosen = False
        elif node.op == "Conv":
            chosen = is_pixel_conv(graph, node)
        elif node.op == "Block":
            chosen = True
        elif node.op in INTEGER:
            chosen = _is_byte_image(graph, node, pixel)
        elif node.op == "QuantizeLinear":
            used = any(reader.op in INTEGER for reader in consumers.get(node.outputs[0], []))
            chosen = _is_image(graph, node.outputs[0]) and (used or node.inputs[0] in pixel)
        else:
            chosen = node.op in FOLLOWERS and _follows(graph, node, pixel)
        if chosen:
            pixel.update(name for name in node.outputs if name)
    return frozenset(pixel)


def is_pixel_conv(graph: Graph, node: Node) -> bool:
    """Say whether a convolution is two-dimensional float32 with fixed weights."""
    known = all(graph.constant(name) is not None for name in node.inputs[1:3] if name)
    return known and all(
        _is_image(graph, name) and graph.dtype(name) == np.float32
        for name in (node.inputs[0], node.outputs[0])
    )


def _is_image(graph: Graph, name: str) -> bool:
    kind = graph.types[name]
    return len(kind.shape) == 4 and kind.dtype in (np.float32, np.uint8) and 0 not in kind.shape


def _is_byte_image(graph: Graph, node: Node, pixel: set[str]) -> bool:
    """Say whether an integer operator works on pixels; tables and sums also run on rows of bytes."""
    if node.attrs.get("rows") or not _is_image(graph, node.outputs[0]):
        return False
    alike = all(graph.shape(name) == graph.shape(node.outputs[0]) for name in node.inputs)
    flexible = node.op in ("QTable", "QAdd", "QMul") and alike
    return not flexible or any(name in pixel for name in node.inputs)


def _follows(graph: Graph, node: Node, pixel: set[str]) -> bool:
    if not any(name in pixel for name in node.inputs):
        return False
    outputs = [name for name in node.outputs if name]
    if any(not _is_image(graph, name) for name in outputs):
        return False
    bytes_too = node.op in BYTE_FOLLOWERS or node.op == "DequantizeLinear"
    if not bytes_too and any(graph.dtype(name) != np.float32 for name in [*outputs, node.inputs[0]]):
        return False
    if node.op == "MaxPool":
        return len(node.outputs) == 1 or not node.outputs[1]
    if node.op.startswith("Reduce"):
        return bool(node.attrs.get("keepdims", 1)) and reduced_axes(graph, node) == {2, 3}
    if node.op.endswith("Normalization"):
        return all(graph.constant(name) is not None for name in node.inputs[1:3])
    return node.op != "Gather" or (
        node.attrs.get("axis", 0) % 4 == 1 and graph.constant(node.inputs[1]) is not None
    )


def reduced_axes(graph: Graph, node: Node) -> set[int] | None:
    """Return the axes of a reduction of a rank-4 tensor, None where they are not fixed."""
    axes = node.attrs.get("axes")
    if axes is None and node.input(1):
        value = graph.constant(node.inputs[1])
        axes = None if value is None else value.reshape(-1).tolist()
    return None if axes is None else {int(axis) % 4 for axis in axes}


def plan_homes(graph: Graph, pixel: frozenset[str]) -> dict[str, tuple[str, int]]:
    """Return for each tensor that is computed right inside a concatenation: the whole, and its first channel.

    Only what convolutions and vector loops write: they keep off the channels behind their own.
    """
    producers, consumers = graph.producers(), graph.consumers()
    homes: dict[str, tuple[str, int]] = {}
    for node in graph.nodes:
        if node.op not in ("Concat", "QConcat") or node.outputs[0] not in pixel:
            continue
        if node.op == "Concat" and node.attrs["axis"] % 4 != 1:
            continue
        channel = 0
        whole = node.attrs.get("y")
        for name, pair in zip(node.inputs, node.attrs.get("parts", [None] * len(node.inputs)), strict=True):
            producer = producers.get(name)
            able = producer is not None and producer.op in MAKERS and name in pixel and pair == whole
            joins = [reader for reader in consumers[name] if reader.op in ("Concat", "QConcat")]
            if able and len(joins) == 1 and name not in graph.outputs:
                homes[name] = (node.outputs[0], channel)
            channel += graph.shape(name)[1]
    return homes


def is_depthwise(graph: Graph, node: Node) -> bool:
    """Say whether every channel is convolved with one filter of its own."""
    return depth_multiplier(graph, node) == 1


def depth_multiplier(graph: Graph, node: Node) -> int:
    """Return how many filters of its own every channel has, 0 where filters read several channels."""
    channels, filters = graph.shape(node.inputs[0])[1], graph.shape(node.inputs[1])[0]
    return filters // channels if node.attrs.get("group", 1) == channels > 1 else 0


def wanted_borders(
    graph: Graph, pixel: frozenset[str], homes: dict[str, tuple[str, int]]
) -> dict[str, Border]:
    """Return for each tensor the border of zeros that its dense convolutions read."""
    borders: dict[str, Border] = {}
    producers = graph.producers()
    for node in graph.nodes:
        conv = node.attrs["expand"] if node.op == "Block" else node
        if conv is None or conv.op != "Conv" or node.outputs[0] not in pixel or depth_multiplier(graph, conv):
            continue
        border = conv_border(graph, conv)
        old = borders.get(node.inputs[0], NO_BORDER)
        producer = producers.get(node.inputs[0])
        if any(border) and node.inputs[0] in pixel and producer is not None and producer.op in FRAMED:
            borders[node.inputs[0]] = tuple(map(max, old, border))  # type: ignore[assignment]
    for name in homes:
        # A part has the border of the whole, which is cleared once.
        borders.pop(name, None)
    return borders


def conv_border(graph: Graph, node: Node) -> Border:
    """Return the zeros around a convolution's input."""
    window = conv_window(
        node.attrs,
        graph.shape(node.inputs[1])[2:],
        graph.shape(node.inputs[0])[2:],
        graph.shape(node.outputs[0])[2:],
    )
    below, right = window.after
    if node.attrs.get("winograd"):
        # Whole windows of 4x4 outputs are read.
        below, right = below + -window.outputs[0] % 4, right + -window.outputs[1] % 4
    return (window.before[0], window.before[1], below, right)
