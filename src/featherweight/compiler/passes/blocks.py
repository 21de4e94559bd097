"""Block fusion: an inverted residual whose expanded map overflows the cache runs strip by strip as one step.

A `Block` holds its layers in the attributes `expand` (a 1x1, a stem, or None), `depthwise` and `project` (or
None: a squeeze-excite follows, which needs the whole map); its inputs are the block's input and the tensors
that the last layer's epilogue reads. On a processor this pays only where
the map between the layers would leave the second-level cache.
"""

from __future__ import annotations

import math

from featherweight.compiler.alternatives import Alternatives, count_time
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.passes.layout import conv_border, is_depthwise, is_pixel_conv
from featherweight.compiler.tiles import depthwise_outputs

MAP_BYTES = 2**20
"""Maps below this stay in a second-level cache between two layers."""

SPARSE_MAP_BYTES = 2**20
"""The same for the map behind a sparse layer, which reads its input more often where it is joined."""


def fuse_blocks(graph: Graph, alternatives: Alternatives | None = None) -> None:
    """Replace the convolutions of each such block by one `Block`, in place of the last.

    Args:
        graph: changed in place.
        alternatives: what was measured of blocks in either form.
    """
    alternatives = alternatives or Alternatives()
    for number, node in enumerate(list(graph.nodes)):
        found = _block_around(graph, node)
        if found is None:
            continue
        expand, project = found
        inner = [node.outputs[0]] + ([node.inputs[0]] if expand else [])
        parts = [part for part in (expand, node, project) if part is not None]
        key = "block-" + "-".join("x".join(map(str, graph.shape(part.inputs[1]))) for part in parts)
        key += "-on-" + "x".join(map(str, graph.shape(parts[0].inputs[0])))
        large = max(math.prod(graph.shape(name)) * 4 for name in inner) >= MAP_BYTES
        fused = alternatives.prefers(f"{key}-fused", f"{key}-apart", large)
        if alternatives.trial:
            fused = alternatives.trial == "joined"
        if not fused:
            for part in parts:
                count_time(part, f"{key}-apart", number)
            continue
        attrs = {"expand": expand, "depthwise": node, "project": project}
        last = project or node
        inputs = [parts[0].inputs[0], *(_extra(project) if project else [])]
        block = Node("Block", last.name, inputs, list(last.outputs), attrs)
        count_time(block, f"{key}-fused", number)
        graph.nodes[graph.nodes.index(last)] = block
        graph.nodes = [kept for kept in graph.nodes if kept not in parts]


def _block_around(graph: Graph, node: Node) -> tuple[Node | None, Node | None] | None:
    """Return the layers around a depthwise one that can run with it as a block; one of them may be None."""
    if node.op != "Conv" or not is_pixel_conv(graph, node) or not is_depthwise(graph, node):
        return None
    if "planar" in node.attrs:
        return None
    producers, consumers = graph.producers(), graph.consumers()
    expand = producers.get(node.inputs[0])
    if not (expand is not None and _is_expansion(graph, expand, consumers)):
        expand = None
    readers = consumers.get(node.outputs[0], [])
    project = readers[0] if len(readers) == 1 and readers[0].inputs[0] == node.outputs[0] else None
    if project is None or not _is_pointwise(graph, project) or node.outputs[0] in graph.outputs:
        project = None
    if project is not None and node.outputs[0] in project.inputs[1:]:
        project = None
    if expand is None and project is None:
        return None
    window = [(node.attrs.get(name) or [1, 1])[1] for name in ("strides", "dilations")]
    if depthwise_outputs(graph.shape(node.inputs[1])[3], *window, vector=1) == 0:
        return None
    return None if _residual(graph, node) else (expand, project)


def fuse_sparse_blocks(graph: Graph, alternatives: Alternatives | None = None) -> None:
    """Join each sparse layer and the depthwise one that alone reads it to a `SparseBlock`.

    Args:
        graph: changed in place.
        alternatives: what was measured of these pairs in either form.
    """
    alternatives = alternatives or Alternatives()
    for number, node in enumerate(list(graph.nodes)):
        if node.attrs.get("planar") != "depthwise" or node.op != "Conv":
            continue
        expand = graph.producers().get(node.inputs[0])
        if expand is None or expand.attrs.get("planar") != "sparse" or _residual(graph, expand):
            continue
        if len(graph.consumers()[node.inputs[0]]) > 1 or node.inputs[0] in graph.outputs:
            continue
        zeros = (graph.constants[expand.inputs[1]] == 0).mean()
        shapes = [graph.shape(name) for name in (expand.inputs[0], expand.inputs[1], node.inputs[1])]
        key = "pair-" + "-".join("x".join(map(str, shape)) for shape in shapes)
        key += f"-{node.attrs.get('strides')}-z{zeros:.2f}"
        large = graph.types[node.inputs[0]].size_bytes >= SPARSE_MAP_BYTES
        joined = alternatives.prefers(f"{key}-joined", f"{key}-apart", large)
        if alternatives.trial:
            joined = alternatives.trial == "joined"
        if not joined:
            for part in (expand, node):
                count_time(part, f"{key}-apart", number)
            continue
        attrs = {"expand": expand, "depthwise": node, "planar": "block", "facts": expand.attrs["facts"]}
        block = Node("SparseBlock", node.name, [expand.inputs[0]], list(node.outputs), attrs)
        count_time(block, f"{key}-joined", number)
        graph.nodes[graph.nodes.index(node)] = block
        graph.nodes.remove(expand)


def _is_pointwise(graph: Graph, node: Node) -> bool:
    if node.op != "Conv" or not is_pixel_conv(graph, node) or node.attrs.get("group", 1) != 1:
        return False
    if "planar" in node.attrs:
        return False
    strides = set(node.attrs.get("strides") or [1])
    return graph.shape(node.inputs[1])[2:] == (1, 1) and strides == {1} and not any(conv_border(graph, node))


def _is_expansion(graph: Graph, node: Node, consumers: dict[str, list[Node]]) -> bool:
    """Say whether a node is a dense convolution, a stem say, whose result only one layer sees."""
    if node.op != "Conv" or not is_pixel_conv(graph, node) or "planar" in node.attrs:
        return False
    alone = len(consumers.get(node.outputs[0], [])) == 1 and node.outputs[0] not in graph.outputs
    return alone and node.attrs.get("group", 1) == 1 and not _residual(graph, node)


def _extra(node: Node) -> list[str]:
    return [name for name in node.inputs[1:] if name]


def _residual(graph: Graph, node: Node) -> bool:
    return any(graph.constant(name) is None for name in node.inputs[3:])
