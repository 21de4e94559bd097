"""Recognise what exporters spell out: channel shuffles, global means, one-dimensional convolutions."""

from __future__ import annotations

import numpy as np

from featherweight.compiler.graph import Graph, Node, TensorType, rewrite
from featherweight.compiler.passes.layout import reduced_axes


def lift_patterns(graph: Graph) -> None:
    """Replace the patterns in place."""
    rewrite(graph, _lift_shuffle)
    rewrite(graph, _lift_mean)
    rewrite(graph, _lift_group_norm)
    rewrite(graph, _widen_conv)


def _only_consumer(graph: Graph, name: str) -> Node | None:
    readers = graph.consumers().get(name, [])
    return readers[0] if len(readers) == 1 and name not in graph.outputs else None


def _lift_shuffle(graph: Graph, node: Node) -> bool:
    """Reshape, swap of two axes and reshape back are a gather along the channels."""
    if node.op != "Reshape" or len(graph.shape(node.inputs[0])) != 4:
        return False
    turn = _only_consumer(graph, node.outputs[0])
    if turn is None or turn.op != "Transpose" or list(turn.attrs.get("perm", [])) != [0, 2, 1, 3, 4]:
        return False
    back = _only_consumer(graph, turn.outputs[0])
    shape, split = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    if back is None or back.op != "Reshape" or graph.shape(back.outputs[0]) != shape:
        return False
    if split[0] != shape[0] or split[3:] != shape[2:]:
        return False
    order = np.arange(shape[1]).reshape(split[1], split[2]).T.reshape(-1)
    indices = graph.add_constant(node.name + ".order", order.astype(np.int64))
    graph.nodes[graph.nodes.index(back)] = Node(
        "Gather", node.name, [node.inputs[0], indices], list(back.outputs), {"axis": 1}
    )
    return True


def _lift_mean(graph: Graph, node: Node) -> bool:
    """A mean over rows and columns is a global pool, and a reshape where the axes are dropped."""
    kind = graph.types[node.inputs[0]] if node.inputs and node.inputs[0] else None
    if node.op != "ReduceMean" or kind is None or len(kind.shape) != 4 or kind.dtype != np.float32:
        return False
    if reduced_axes(graph, node) != {2, 3}:
        return False
    if node.attrs.get("keepdims", 1):
        node.op, node.attrs, node.inputs = "GlobalAveragePool", {}, node.inputs[:1]
        return True
    pooled = graph.free_name(node.name + ".pooled")
    graph.types[pooled] = TensorType((*kind.shape[:2], 1, 1), kind.dtype)
    shape = graph.add_constant(node.name + ".shape", np.array(kind.shape[:2], np.int64))
    place = graph.nodes.index(node)
    graph.nodes[place : place + 1] = [
        Node("GlobalAveragePool", node.name, node.inputs[:1], [pooled]),
        Node("Reshape", node.name + " drop axes", [pooled, shape], list(node.outputs)),
    ]
    return True


def _lift_group_norm(graph: Graph, node: Node) -> bool:
    """An instance norm between two reshapes is a group norm."""
    if node.op != "InstanceNormalization" or len(graph.shape(node.inputs[0])) != 3:
        return False
    split = graph.producers().get(node.inputs[0])
    back = _only_consumer(graph, node.outputs[0])
    if split is None or split.op != "Reshape" or back is None or back.op != "Reshape":
        return False
    shape, groups = graph.shape(split.inputs[0]), graph.shape(node.inputs[0])[1]
    scale, shift = (graph.constant(name) for name in node.inputs[1:3])
    if len(shape) != 4 or graph.shape(back.outputs[0]) != shape or shape[1] % groups:
        return False
    if graph.shape(node.inputs[0])[0] != shape[0] or scale is None or shift is None:
        return False
    wide = [
        graph.add_constant(node.name + suffix, np.repeat(value, shape[1] // groups))
        for suffix, value in ((".scale", scale), (".shift", shift))
    ]
    attrs = {"num_groups": groups, "epsilon": node.attrs.get("epsilon", 1e-5)}
    graph.nodes[graph.nodes.index(back)] = Node(
        "GroupNormalization", node.name, [split.inputs[0], *wide], list(back.outputs), attrs
    )
    return True


def _widen_conv(graph: Graph, node: Node) -> bool:
    """A one-dimensional convolution is a two-dimensional one of height one."""
    if node.op != "Conv" or len(graph.shape(node.inputs[0])) != 3:
        return False
    weight = graph.constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return False
    place = graph.nodes.index(node)
    wide = []
    for name in (node.inputs[0], node.outputs[0]):
        n, c, length = graph.shape(name)
        wide.append(graph.free_name(name + ".wide"))
        graph.types[wide[-1]] = TensorType((n, c, 1, length), graph.dtype(name))
    shapes = [
        graph.add_constant(node.name + ".shape", np.array(graph.shape(name), np.int64))
        for name in (wide[0], node.outputs[0])
    ]
    before, after = node.attrs.get("pads") or [0, 0]
    attrs = {
        "group": node.attrs.get("group", 1),
        "strides": [1, *(node.attrs.get("strides") or [1])],
        "dilations": [1, *(node.attrs.get("dilations") or [1])],
        "pads": [0, before, 0, after],
    }
    inputs = [wide[0], graph.add_constant(node.inputs[1], weight[:, :, None, :]), *node.inputs[2:]]
    graph.nodes[place : place + 1] = [
        Node("Reshape", node.name + " widen", [node.inputs[0], shapes[0]], [wide[0]]),
        Node("Conv", node.name, inputs, [wide[1]], attrs),
        Node("Reshape", node.name + " narrow", [wide[1], shapes[1]], list(node.outputs)),
    ]
    return True
