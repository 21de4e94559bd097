"""Drop what computes nothing: identities, dropout at evaluation, casts to the same type, dead nodes."""

from __future__ import annotations

from featherweight.compiler.graph import Graph, Node, rewrite

_SILENT = frozenset(
    [
        "Identity",
        "Dropout",
        "Reshape",
        "Expand",
        "Cast",
        "Pad",
        "Slice",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
    ]
)


def clean_up(graph: Graph) -> None:
    """Remove nodes whose output is their input."""
    rewrite(graph, _drop)
    graph.remove_dead()


def _drop(graph: Graph, node: Node) -> bool:
    if node.op not in _SILENT or not _is_silent(graph, node):
        return False
    source, result = node.inputs[0], node.outputs[0]
    if result in graph.outputs:
        return False
    graph.rename_uses(result, source)
    return True


def _is_silent(graph: Graph, node: Node) -> bool:
    if graph.types[node.inputs[0]] != graph.types[node.outputs[0]]:
        return False
    if node.op == "Dropout":
        mode = graph.constant(node.input(2))
        return not node.output(1) and (not node.input(2) or (mode is not None and not mode.any()))
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return order is not None and list(order) == sorted(order)
    if node.op == "Pad":
        pads = graph.constant(node.inputs[1])
        return pads is not None and not pads.any()
    if node.op == "Slice":
        steps = graph.constant(node.input(4))
        return not node.input(4) or (steps is not None and (steps == 1).all())
    return node.op != "Cast" or "to" in node.attrs
