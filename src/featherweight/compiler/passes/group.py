"""Gather element-wise operators into groups that run as one loop, and those into the layer before them."""

from __future__ import annotations

import numpy as np

from featherweight.compiler.expressions import ELEMENTWISE
from featherweight.compiler.graph import Graph, Node, sort_nodes
from featherweight.compiler.passes.layout import is_pixel_conv
from featherweight.compiler.vector_expressions import is_vector

MAX_OPS, MAX_INPUTS = 24, 8
FUSED = ("Conv", "Linear")


def group_elementwise(graph: Graph) -> None:
    """Replace every element-wise node by a `Group` that also computes what only it reads.

    A `Group` has the attribute `body`: its nodes in order. Its inputs are what the body reads from outside.
    """
    producers, consumers = graph.producers(), graph.consumers()
    outputs = set(graph.outputs)
    taken: set[int] = set()
    groups: dict[int, Node] = {}
    for root in reversed(graph.nodes):
        if root.op not in ELEMENTWISE or id(root) in taken:
            continue
        body = [root]
        members = {id(root)}
        shape = graph.shape(root.outputs[0])
        grown = True
        while grown:
            grown = False
            for name in _outside(body):
                node = producers.get(name)
                if node is None or node.op not in ELEMENTWISE or id(node) in taken or name in outputs:
                    continue
                inside = all(id(reader) in members for reader in consumers[name])
                fits = graph.shape(name) == shape and len(body) < MAX_OPS
                if inside and fits and len(_outside([*body, node])) <= MAX_INPUTS:
                    body.append(node)
                    members.add(id(node))
                    grown = True
        taken |= members
        ordered, _ = sort_nodes(sorted(body, key=graph.nodes.index), _outside(body))
        groups[id(root)] = Node("Group", root.name, _outside(body), list(root.outputs), {"body": ordered})
    graph.nodes = [
        groups.get(id(node), node) for node in graph.nodes if id(node) in groups or id(node) not in taken
    ]


def _outside(body: list[Node]) -> list[str]:
    """Return what a body reads from outside, each once, in order."""
    made = {name for node in body for name in node.outputs}
    return [
        name
        for name in dict.fromkeys(name for node in body for name in node.inputs)
        if name and name not in made
    ]


def fuse_epilogues(graph: Graph) -> None:
    """Merge each group into the last convolution or `Linear` whose result only it reads.

    The node then carries `body`, the group's nodes, `sum`, the name of its own result inside the body, and as
    further inputs at most one tensor of the result's shape or of one value a channel, and constants.
    """
    for group in list(graph.nodes):
        if group.op != "Group" or not is_vector(graph, group.attrs["body"]):
            continue
        host = _host(graph, group)
        if host is None:
            continue
        source = host.outputs[0]
        others = [name for name in group.inputs if name != source]
        host.attrs = {**host.attrs, "body": group.attrs["body"], "sum": source}
        host.inputs = [*([*host.inputs, ""])[:3], *others]
        host.outputs = list(group.outputs)
        place = graph.nodes.index(group)
        graph.nodes[place] = host
        graph.nodes.pop(graph.nodes.index(host))


def _host(graph: Graph, group: Node) -> Node | None:
    producers, consumers = graph.producers(), graph.consumers()
    shape = graph.shape(group.outputs[0])
    found = None
    for name in group.inputs:
        node = producers.get(name)
        if node is None or node.op not in FUSED or "body" in node.attrs or name in graph.outputs:
            continue
        if graph.shape(name) != shape or len(consumers[name]) != 1:
            continue
        if node.op == "Conv" and not is_pixel_conv(graph, node):
            continue
        others = [other for other in group.inputs if other != name and graph.constant(other) is None]
        if len(others) > 1 or any(not _is_residual(graph, other, shape, node) for other in others):
            continue
        if not all(
            _is_channel_constant(graph, other, shape, node)
            for other in group.inputs
            if other not in (name, *others)
        ):
            continue
        if found is None or graph.nodes.index(node) > graph.nodes.index(found):
            found = node
    return found


def _is_residual(graph: Graph, name: str, shape: tuple[int, ...], host: Node) -> bool:
    own = graph.shape(name)
    if graph.dtype(name) != np.float32 or host.attrs.get("planar") == "depthwise":
        return False
    if "planar" in host.attrs:
        return own == shape
    # One value a channel of each image repeats over the pixels: the gate of a squeeze-excite.
    return own == shape or (host.op == "Conv" and len(shape) == 4 and own == (*shape[:2], 1, 1))


def _is_channel_constant(graph: Graph, name: str, shape: tuple[int, ...], host: Node) -> bool:
    value = graph.constants[name]
    if value.size == 1:
        return True
    wide = (1,) * (len(shape) - value.ndim) + value.shape
    axis = len(shape) - 1 if host.op == "Linear" else 1
    return value.size == shape[axis] and len(wide) == len(shape) and wide[axis] == shape[axis]
