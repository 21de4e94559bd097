"""Block fusion: an inverted residual whose expanded map overflows the cache runs strip by strip as one step.

A `Block` holds its layers in the attributes `expand` (or None), `depthwise` and `project`; its inputs are
the block's input and the tensors that the last layer's epilogue reads. On a processor this pays only where
the map between the layers would leave the second-level cache.
"""

from __future__ import annotations

import math

from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.passes.layout import conv_border, is_depthwise, is_pixel_conv
from featherweight.compiler.tiles import depthwise_outputs

MAP_BYTES = 2**20
"""Maps below this stay in a second-level cache between two layers."""

SPARSE_MAP_BYTES = 2**20
"""The same for the map behind a sparse layer, which reads its input more often where it is joined."""


def fuse_blocks(graph: Graph) -> None:
    """Replace the convolutions of each such block by one `Block`, in place of the last."""
    for node in list(graph.nodes):
        if node.op != "Conv" or not is_pixel_conv(graph, node) or not is_depthwise(graph, node):
            continue
        if "planar" in node.attrs:
            continue
        producers, consumers = graph.producers(), graph.consumers()
        expand = producers.get(node.inputs[0])
        if not (expand is not None and _is_inner(graph, expand, consumers) and not _residual(graph, expand)):
            expand = None
        readers = consumers.get(node.outputs[0], [])
        project = readers[0] if len(readers) == 1 and readers[0].inputs[0] == node.outputs[0] else None
        if (
            project is None
            or not _is_pointwise(graph, project)
            or not _is_inner(graph, node, consumers, False)
        ):
            continue
        window = [(node.attrs.get(name) or [1, 1])[1] for name in ("strides", "dilations")]
        if depthwise_outputs(graph.shape(node.inputs[1])[3], *window, vector=1) == 0:
            continue
        if _residual(graph, node) or node.outputs[0] in project.inputs[1:]:
            continue
        inner = [node.outputs[0]] + ([node.inputs[0]] if expand else [])
        if max(math.prod(graph.shape(name)) * 4 for name in inner) < MAP_BYTES:
            continue
        first = expand or node
        attrs = {"expand": expand, "depthwise": node, "project": project}
        block = Node("Block", project.name, [first.inputs[0], *_extra(project)], list(project.outputs), attrs)
        graph.nodes[graph.nodes.index(project)] = block
        for part in (expand, node):
            if part is not None:
                graph.nodes.remove(part)


def fuse_sparse_blocks(graph: Graph) -> None:
    """Join each sparse layer and the depthwise one that alone reads it to a `SparseBlock`.

    Only where the map between them overflows the cache.
    """
    for node in list(graph.nodes):
        if node.attrs.get("planar") != "depthwise" or node.op != "Conv":
            continue
        expand = graph.producers().get(node.inputs[0])
        if expand is None or expand.attrs.get("planar") != "sparse" or _residual(graph, expand):
            continue
        alone = len(graph.consumers()[node.inputs[0]]) == 1 and node.inputs[0] not in graph.outputs
        if alone and graph.types[node.inputs[0]].size_bytes >= SPARSE_MAP_BYTES:
            attrs = {"expand": expand, "depthwise": node, "planar": "block"}
            block = Node("SparseBlock", node.name, [expand.inputs[0]], list(node.outputs), attrs)
            graph.nodes[graph.nodes.index(node)] = block
            graph.nodes.remove(expand)


def _is_pointwise(graph: Graph, node: Node) -> bool:
    if node.op != "Conv" or not is_pixel_conv(graph, node) or node.attrs.get("group", 1) != 1:
        return False
    if "planar" in node.attrs:
        return False
    strides = set(node.attrs.get("strides") or [1])
    return graph.shape(node.inputs[1])[2:] == (1, 1) and strides == {1} and not any(conv_border(graph, node))


def _is_inner(graph: Graph, node: Node, consumers: dict[str, list[Node]], pointwise: bool = True) -> bool:
    """Say whether only one layer reads a layer's result, and nothing else sees it."""
    alone = len(consumers.get(node.outputs[0], [])) == 1 and node.outputs[0] not in graph.outputs
    return alone and (not pointwise or _is_pointwise(graph, node))


def _extra(node: Node) -> list[str]:
    return [name for name in node.inputs[1:] if name]


def _residual(graph: Graph, node: Node) -> bool:
    return any(graph.constant(name) is None for name in node.inputs[3:])
