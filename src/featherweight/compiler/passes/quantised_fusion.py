"""Move tables, sums and changes of scale into the 8-bit convolution that only they read."""

from __future__ import annotations

from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.pack_int8 import unary_table


def fuse_tables(graph: Graph) -> None:
    """Let a convolution look its result up where only a table reads it."""
    for node in list(graph.nodes):
        if node.op != "QTable":
            continue
        producer = graph.producers().get(node.inputs[0])
        alone = len(graph.consumers()[node.inputs[0]]) == 1 and node.inputs[0] not in graph.outputs
        if producer is not None and producer.op == "QConv" and alone and "table" not in producer.attrs:
            producer.attrs = {**producer.attrs, "table": node.attrs["table"]}
            producer.outputs = list(node.outputs)
            graph.nodes.remove(node)


def fuse_sums(graph: Graph) -> None:
    """Let the last convolution before a sum add the other map itself, where only the sum reads its result."""
    for node in list(graph.nodes):
        if node.op != "QAdd":
            continue
        producers, consumers = graph.producers(), graph.consumers()
        hosts = []
        for side, name in enumerate(node.inputs):
            host = producers.get(name)
            alone = len(consumers[name]) == 1 and name not in graph.outputs
            if host is not None and host.op == "QConv" and alone and _adds(graph, host, name):
                hosts.append((graph.nodes.index(host), side, host))
        if not hosts:
            continue
        _, side, host = max(hosts)
        mine, other = ("a", "b") if side == 0 else ("b", "a")
        keep = {key: node.attrs[key] for key in ("y", "low", "high")}
        host.attrs = {**host.attrs, "sum": {**keep, "q": node.attrs[mine], "r": node.attrs[other]}}
        host.inputs = [host.inputs[0], node.inputs[1 - side]]
        host.outputs = list(node.outputs)
        graph.nodes[graph.nodes.index(node)] = host
        graph.nodes.remove(host)


def _adds(graph: Graph, host: Node, name: str) -> bool:
    """Say whether a convolution has no activation of its own, which the fused sum has no room for."""
    scale, zero = host.attrs["y"]
    steps = [value / scale + zero for value in (host.attrs["low"], host.attrs["high"])]
    free = steps[0] <= 0 and steps[1] >= 255 and not host.attrs["rows"]
    return free and "table" not in host.attrs and "sum" not in host.attrs and len(graph.shape(name)) == 4


def fuse_concats(graph: Graph) -> None:
    """Let a convolution write its part of a concatenation in the scale of the whole, if it alone reads it."""
    producers, consumers = graph.producers(), graph.consumers()
    for node in graph.nodes:
        if node.op != "QConcat":
            continue
        parts = list(node.attrs["parts"])
        for index, (name, pair) in enumerate(zip(node.inputs, parts, strict=True)):
            host = producers.get(name)
            alone = len(consumers[name]) == 1 and name not in graph.outputs
            if (
                host is None
                or host.op != "QConv"
                or not alone
                or "sum" in host.attrs
                or pair == node.attrs["y"]
            ):
                continue
            change = unary_table(lambda value: value, pair, node.attrs["y"])
            own = host.attrs.get("table")
            host.attrs = {**host.attrs, "table": change if own is None else change[own]}
            parts[index] = node.attrs["y"]
        node.attrs = {**node.attrs, "parts": parts}
