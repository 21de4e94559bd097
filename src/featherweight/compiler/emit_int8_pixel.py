"""What stands between 8-bit convolutions: tables, sums, products, pools, and the ways in and out."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.conv_parts import initialiser
from featherweight.compiler.ctype import CType
from featherweight.compiler.emit_elementwise import emit_quantize
from featherweight.compiler.emit_int8 import headers
from featherweight.compiler.emit_pixel import pixel_strides
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import copy
from featherweight.compiler.lower import Lowering, emits, emits_pixel
from featherweight.compiler.pack_int8 import blocks_of, unary_table
from featherweight.compiler.program import View
from featherweight.compiler.windows import conv_window

FLOAT = CType(np.dtype(np.float32))


def _flat(lowering: Lowering, node: Node, name: str) -> View:
    """Return a byte tensor in the layout of the node's result."""
    return lowering.own_pixels(name) if node.outputs[0] in lowering.pixel else lowering.plain(name)


def _elements(view: View) -> int:
    """Return the bytes of a dense view, the lanes past the last channel included."""
    return view.shape[0] * view.strides[0] if view.pixel else math.prod(view.shape)


@emits("QTable")
@emits_pixel("QTable")
def emit_table(lowering: Lowering, node: Node) -> None:
    """y = table[x]."""
    headers(lowering, "int8_elementwise.h")
    source = _flat(lowering, node, node.inputs[0])
    writer = lowering.start(node, "8-bit table")
    x, table = writer.pointer(source, restrict=False), writer.constant(node.attrs["table"])
    y = lowering.write(writer, node.outputs[0], restrict=False)
    writer.step.in_place.append((y.view.storage, source.storage))
    writer.line(f"fw_u8_table({x.var}, {y.var}, {_elements(y.view)}, {table.var}, tid, threads);")


def _ratio(a: float, b: float = 1.0, y: float = 1.0) -> str:
    return FLOAT.literal(np.float32(np.float32(a) * np.float32(b)) / np.float32(y))


@emits("QAdd", "QMul")
@emits_pixel("QAdd", "QMul")
def emit_binary(lowering: Lowering, node: Node) -> None:
    """Sums and products, and the gate of a squeeze-excite."""
    headers(lowering, "int8_elementwise.h")
    attrs = node.attrs
    views = [_flat(lowering, node, name) for name in node.inputs]
    writer = lowering.start(node, "8-bit sum" if node.op == "QAdd" else "8-bit product of maps")
    a, b = (writer.pointer(view, restrict=False) for view in views)
    y = lowering.write(writer, node.outputs[0], restrict=False)
    fields = {
        "a_zero": attrs["a"][1],
        "b_zero": attrs["b"][1],
        "zero": attrs["y"][1],
        "lo": attrs["low"],
        "hi": attrs["high"],
    }
    if node.op == "QAdd":
        fields |= {
            "a_ratio": _ratio(attrs["a"][0], y=attrs["y"][0]),
            "b_ratio": _ratio(attrs["b"][0], y=attrs["y"][0]),
        }
    else:
        fields |= {"a_ratio": _ratio(attrs["a"][0], attrs["b"][0], attrs["y"][0])}
    writer.line(f"static const fw_u8_binary shape = {{{initialiser(fields)}}};")
    shapes = [view.shape for view in views]
    if shapes[0] == shapes[1]:
        writer.step.in_place += [(y.view.storage, view.storage) for view in views]
        name = "fw_u8_add" if node.op == "QAdd" else "fw_u8_multiply"
        writer.line(f"{name}(&shape, {a.var}, {b.var}, {y.var}, {_elements(y.view)}, tid, threads);")
        return
    pixels, step = shapes[0][2] * shapes[0][3], views[0].strides[3]
    for image in range(shapes[0][0]):
        start = image * views[0].strides[0]
        gate = f"{b.var} + {image * views[1].strides[0]}"
        maps = f"{a.var} + {start}, {gate}, {y.var} + {start}"
        writer.line(f"fw_u8_gate(&shape, {maps}, {pixels}, {step}, tid, threads);")


@emits_pixel("QGlobalPool")
def emit_byte_global_pool(lowering: Lowering, node: Node) -> None:
    """The mean of every channel."""
    headers(lowering, "int8_elementwise.h")
    source = lowering.own_pixels(node.inputs[0])
    n, c, h, w = source.shape
    writer = lowering.start(node, "8-bit pool")
    x, y = writer.pointer(source), lowering.write(writer, node.outputs[0])
    (x_scale, x_zero), (y_scale, y_zero) = node.attrs["x"], node.attrs["y"]
    ratio = FLOAT.literal(np.float32(x_scale) / (np.float32(h * w) * np.float32(y_scale)))
    for image in range(n):
        at = f"{x.var} + {image * source.strides[0]}, {y.var} + {image * y.strides[0]}"
        sizes = f"{h * w}, {source.strides[3]}, {blocks_of(c)}, {x_zero}, {ratio}, {y_zero}"
        writer.line(f"fw_u8_global_pool({at}, {sizes}, tid, threads);")


@emits_pixel("QPool")
def emit_byte_pool(lowering: Lowering, node: Node) -> None:
    """Windows: the greatest byte, or the mean."""
    headers(lowering, "int8_elementwise.h")
    source = lowering.own_pixels(node.inputs[0])
    attrs = node.attrs["pool"]
    shape, outputs = source.shape, lowering.graph.shape(node.outputs[0])
    window = conv_window(attrs, attrs["kernel_shape"], shape[2:], outputs[2:])
    writer = lowering.start(node, "8-bit pool")
    x, y = writer.pointer(source), lowering.write(writer, node.outputs[0])
    average = 0 if attrs["op"] == "MaxPool" else 2 if attrs.get("count_include_pad", 0) else 1
    fields = {
        "images": shape[0],
        "rows": outputs[2],
        "columns": outputs[3],
        "in_rows": shape[2],
        "in_columns": shape[3],
        "blocks": blocks_of(shape[1]),
        "tap_rows": window.kernel[0],
        "tap_columns": window.kernel[1],
        "stride_rows": window.strides[0],
        "stride_columns": window.strides[1],
        "pad_top": window.before[0],
        "pad_left": window.before[1],
        "average": average,
        "x_zero": node.attrs["x"][1],
        "zero": node.attrs["y"][1],
        "ratio": _ratio(node.attrs["x"][0], y=node.attrs["y"][0]),
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
    }
    writer.line(f"static const fw_u8_window shape = {{{initialiser(fields)}}};")
    writer.line(f"fw_u8_pool(&shape, {x.var}, {y.var}, tid, threads);")


@emits_pixel("QConcat")
def emit_byte_concat(lowering: Lowering, node: Node) -> None:
    """Channels side by side; a part of another scale passes through a table first."""
    headers(lowering, "int8_elementwise.h")
    whole = node.attrs["y"]
    parts = []
    channel = 0
    for name, pair in zip(node.inputs, node.attrs["parts"], strict=True):
        if lowering.homes.get(name, ("",))[0] != node.outputs[0]:
            view = lowering.own_pixels(name)
            if pair != whole:
                view = _rescaled(lowering, name, view, unary_table(lambda value: value, pair, whole))
            parts.append((view, channel))
        channel += lowering.graph.shape(name)[1]
    if not parts:
        return
    writer = lowering.start(node, "8-bit copy")
    pointers = [writer.pointer(view) for view, _ in parts]
    y = lowering.write(writer, node.outputs[0])
    for x, (view, channel) in zip(pointers, parts, strict=True):
        copy(writer, x, y, view.shape, target_offset=channel)


def _rescaled(lowering: Lowering, name: str, view: View, table: np.ndarray) -> View:
    """Emit a step that sends all bytes of a tensor through a table; return the result."""
    target = lowering.pixel_view(view.shape, dtype=view.dtype)
    writer = lowering.start(Node("QTable", f"{name} in another scale", [name], [name]), "8-bit table")
    x, values = writer.pointer(view), writer.constant(table)
    y = writer.pointer(target, writes=True)
    writer.line(f"fw_u8_table({x.var}, {y.var}, {_elements(view)}, {values.var}, tid, threads);")
    return target


@emits_pixel("Gather")
def emit_pixel_gather(lowering: Lowering, node: Node) -> None:
    """Pick channels: the shuffle of a ShuffleNet."""
    indices = lowering.graph.constants[node.inputs[1]]
    if indices.ndim != 1 or lowering.graph.dtype(node.inputs[0]) != np.uint8:
        lowering.emit_plainly(node)
        return
    headers(lowering, "int8_elementwise.h")
    source = lowering.own_pixels(node.inputs[0])
    writer = lowering.start(node, "8-bit copy")
    x, y = writer.pointer(source), lowering.write(writer, node.outputs[0])
    order = writer.constant((indices % source.shape[1]).astype(np.int16))
    pixels = math.prod(source.shape) // source.shape[1]
    sizes = f"{y.strides[3]}, {pixels}, {len(indices)}, {order.var}"
    writer.line(f"fw_u8_gather({x.var}, {source.strides[3]}, {y.var}, {sizes}, tid, threads);")


@emits_pixel("QuantizeLinear", "DequantizeLinear")
def emit_pixel_quantize(lowering: Lowering, node: Node) -> None:
    """Between bytes and float32, channels last on both sides."""
    graph = lowering.graph
    scale, zero = graph.constant(node.inputs[1]), graph.constant(node.input(2))
    narrow = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    alike = lowering.channel_step(graph.shape(narrow)[1], np.dtype(np.uint8)) == lowering.channel_step(
        graph.shape(narrow)[1], np.dtype(np.float32)
    )
    if scale is None or scale.size != 1 or graph.dtype(narrow) != np.uint8 or not alike:
        emit_quantize(lowering, node)
        return
    headers(lowering, "int8_elementwise.h")
    if node.op == "QuantizeLinear" and _is_stem(lowering, node):
        lowering.byte_images[node.outputs[0]] = (node.inputs[0], scale.reshape(-1)[0].item())
        return
    source = lowering.own_pixels(node.inputs[0])
    writer = lowering.start(node, "8-bit conversion")
    x, y = writer.pointer(source), lowering.write(writer, node.outputs[0])
    name = "fw_u8_quantise" if node.op == "QuantizeLinear" else "fw_u8_dequantise"
    start = 0 if zero is None else int(zero.reshape(-1)[0])
    numbers = f"{_elements(source)}, {FLOAT.literal(scale.reshape(-1)[0])}, {start}"
    writer.line(f"{name}({x.var}, {y.var}, {numbers}, tid, threads);")


def _is_stem(lowering: Lowering, node: Node) -> bool:
    """Say whether only dense 8-bit convolutions read the bytes of a row-major image of few channels."""
    name = node.outputs[0]
    few = lowering.graph.shape(name)[1] <= 4 and node.inputs[0] not in lowering.pixel
    readers = lowering.consumers.get(name, [])
    dense = all(
        reader.op == "QConv"
        and reader.inputs == [name]
        and reader.attrs["conv"].get("group", 1) == 1
        and reader.outputs[0] in lowering.pixel
        for reader in readers
    )
    return few and dense and name not in lowering.graph.outputs
