"""Choose the dense 3x3 convolutions that run by Winograd's F(4x4, 3x3), with the attribute `winograd`.

Measured on a processor with AVX-512, such a layer is 2.3 to 3.6 times as fast as the implicit product of
matrices where its transformed weights stay in the second-level cache, at a largest error of 1e-5 of the
largest output.
"""

from __future__ import annotations

from featherweight.compiler.alternatives import Alternatives, count_time
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.passes.layout import conv_border, is_pixel_conv

MIN_CHANNELS = 16
"""Fewer channels leave too little work between the transforms."""

GATHER_CYCLES, SCATTER_CYCLES, PRODUCT_CYCLES = 150.0, 130.0, 1.1
"""Cycles to transform a window of a vector of channels, back again, and of a vector's multiply-add."""

CACHE_BYTES, BYTE_CYCLES = 2**20, 0.11
"""Weights beyond this come from the third-level cache; cycles of a byte from there."""

MARGIN = 0.9
"""Share of the direct form's time that is a clear win."""


def mark_winograd(graph: Graph, vector: int, alternatives: Alternatives) -> None:
    """Mark the nodes in place, once their layout is known to be channels last.

    Args:
        graph: the network.
        vector: floats of a vector register of the target.
        alternatives: what was measured of layers in either form.
    """
    for number, node in enumerate(graph.nodes):
        if not _fits(graph, node):
            continue
        n, channels, _, _ = graph.shape(node.inputs[0])
        filters, rows, columns = graph.shape(node.outputs[0])[1:]
        key = f"3x3-{vector}-{n}x{channels}x{filters}x{rows}x{columns}"
        vectors, windows = -(-filters // vector), n * -(-rows // 4) * -(-columns // 4)
        direct = n * rows * columns * 9 * channels * vectors * PRODUCT_CYCLES
        transforms = GATHER_CYCLES * -(-channels // vector) + SCATTER_CYCLES * vectors
        winograd = windows * (36 * channels * vectors * PRODUCT_CYCLES + transforms)
        size = channels * vectors * vector * 4
        direct += _loading(9 * size)
        winograd += _loading(36 * size)
        chosen = alternatives.prefers(f"{key}-winograd", f"{key}-direct", winograd < MARGIN * direct)
        if alternatives.trial:
            chosen = alternatives.trial == "joined"
        if chosen:
            node.attrs = {**node.attrs, "winograd": True}
        count_time(node, f"{key}-{'winograd' if chosen else 'direct'}", number)


def _loading(size: int) -> float:
    return size * BYTE_CYCLES if size > CACHE_BYTES else 0.0


def _fits(graph: Graph, node: Node) -> bool:
    if node.op != "Conv" or "planar" in node.attrs or not is_pixel_conv(graph, node):
        return False
    filters, depth, *kernel = graph.shape(node.inputs[1])
    ones = all(set(node.attrs.get(name) or [1]) == {1} for name in ("strides", "dilations"))
    plain = kernel == [3, 3] and ones and node.attrs.get("group", 1) == 1
    return plain and min(filters, depth) >= MIN_CHANNELS and max(conv_border(graph, node)) <= 2
