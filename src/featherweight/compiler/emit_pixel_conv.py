"""Convolutions in the pixel layout and products with weights, on the kernels of conv.h and depthwise.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from featherweight.compiler.conv_parts import (
    Epilogue,
    depthwise_parts,
    headers,
    initialiser,
    lanes_of,
    product_parts,
)
from featherweight.compiler.emit_pixel import pixel_strides
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits, emits_pixel
from featherweight.compiler.passes.layout import conv_border, depth_multiplier
from featherweight.compiler.program import Operand, StepWriter, View
from featherweight.compiler.tiles import depthwise_outputs
from featherweight.compiler.windows import Window, conv_window


@emits_pixel("Conv")
def emit_pixel_conv(lowering: Lowering, node: Node) -> None:
    """Depthwise on its own kernel, everything else as a product of matrices."""
    graph = lowering.graph
    shape, outputs = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    window = conv_window(node.attrs, graph.shape(node.inputs[1])[2:], shape[2:], outputs[2:])
    if depth_multiplier(graph, node):
        most = depthwise_outputs(window.kernel[1], window.strides[1], window.dilations[1], lowering.vector)
        if most:
            _emit_depthwise(lowering, node, window, most)
            return
    if node.attrs.get("winograd"):
        from featherweight.compiler.emit_winograd import emit_winograd

        emit_winograd(lowering, node, window)
        return
    _emit_dense(lowering, node, window)


def _repeated(lowering: Lowering, name: str, times: int) -> View:
    """Emit a step that writes every channel `times` times side by side: one for each of its filters."""
    source = lowering.pixel_of(name)
    n, channels, h, w = source.shape
    target = lowering.pixel_view((n, channels * times, h, w))
    headers(lowering, "repeat.h")
    writer = lowering.start(Node("Repeat", f"{name} {times} times", [name], [name]), "layout")
    x, y = writer.pointer(source), writer.pointer(target, writes=True)
    fields = {
        "images": n,
        "rows": h,
        "columns": w,
        "times": times,
        "vectors": target.strides[3] // lowering.vector,
        **pixel_strides("x", source),
        **pixel_strides("y", target),
    }
    writer.line(f"static const fw_repeated shape = {{{initialiser(fields)}}};")
    writer.line(f"fw_repeat(&shape, {x.var}, {y.var}, tid, threads);")
    return target


def residual_of(
    lowering: Lowering, writer: StepWriter, name: str, shape: Sequence[int]
) -> tuple[str, dict[str, int]]:
    """Declare the residual; one value a channel repeats over the pixels."""
    if not name:
        return "NULL", {}
    view = lowering.pixel_of(name)
    strides = pixel_strides("r", view)
    if view.shape[2:] == (1, 1) and tuple(shape[2:]) != (1, 1):
        strides |= {"r_row": 0, "r_column": 0}
    return writer.pointer(view, restrict=False).var, strides


def share_residual(lowering: Lowering, writer: StepWriter, name: str, x: Operand, y: Operand) -> None:
    """Let the result take the place of a residual that dies here, unless it is the layer's input too."""
    if name:
        view = lowering.pixel_of(name)
        same = (view.strides, view.offset) == (y.view.strides, y.view.offset)
        if same and view.storage != x.view.storage:
            writer.step.in_place.append((y.view.storage, view.storage))


def _emit_depthwise(lowering: Lowering, node: Node, window: Window, most: int) -> None:
    times = depth_multiplier(lowering.graph, node)
    source = lowering.pixel_of(node.inputs[0]) if times == 1 else _repeated(lowering, node.inputs[0], times)
    n, channels, _, _ = source.shape
    epilogue = Epilogue(lowering, node)
    if epilogue.residual:
        lowering.pixel_of(epilogue.residual)
    writer = lowering.start(node, macs=n * channels * window.taps * math.prod(window.outputs))
    x = writer.pointer(source)
    residual, strides = residual_of(
        lowering, writer, epilogue.residual, lowering.graph.shape(node.outputs[0])
    )
    y = lowering.write(writer, node.outputs[0], restrict=not strides)
    share_residual(lowering, writer, epilogue.residual, x, y)
    fields = {
        "images": n,
        "lanes": lanes_of(y.view, lowering.vector),
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
        **strides,
    }
    parts = depthwise_parts(lowering, writer, node, epilogue, window, most, fields)
    writer.step.kernel = f"depthwise {window.kernel[0]}x{window.kernel[1]}, tile {parts.tile}"
    writer.line(f"static const fw_depthwise shape = {{{initialiser(parts.fields)}}};")
    pointers = f"{x.var}, {parts.constants}, {residual}, {y.var}"
    writer.line(f"fw_depthwise_run(&shape, spans, {parts.function}, {pointers}, tid, threads);")


def dense_reads(lowering: Lowering, node: Node, window: Window) -> tuple[View, dict[str, int], int]:
    """Return a dense convolution's input at its first tap, the fields that step over it, a tap's channels.

    An input without the border of zeros is copied into one.
    """
    graph = lowering.graph
    channels, border = graph.shape(node.inputs[0])[1], conv_border(graph, node)
    tight = channels <= 4 and node.inputs[0] not in lowering.pixel
    source = lowering.pixel_of(node.inputs[0], border=border, tight=tight)
    offset = source.offset - border[0] * source.strides[2] - border[1] * source.strides[3]
    fields = {
        "tap_rows": window.kernel[0],
        "tap_columns": window.kernel[1],
        "x_image": source.strides[0],
        "x_row": source.strides[2] * window.strides[0],
        "x_column": source.strides[3] * window.strides[1],
        "x_tap_row": source.strides[2] * window.dilations[0],
        "x_tap_column": source.strides[3] * window.dilations[1],
    }
    depth = channels
    if source.strides[3] == channels and node.attrs.get("group", 1) == 1 and window.dilations[1] == 1:
        # The taps of a row lie one behind another: one long tap.
        depth, fields["tap_columns"] = channels * window.kernel[1], 1
    return replace(source, offset=offset), fields, depth


def _emit_dense(lowering: Lowering, node: Node, window: Window) -> None:
    """Any convolution whose groups are few: a product whose rows are output columns."""
    graph = lowering.graph
    n = graph.shape(node.inputs[0])[0]
    weight = graph.constants[node.inputs[1]]
    filters, groups = weight.shape[0], node.attrs.get("group", 1)
    source, reads, depth = dense_reads(lowering, node, window)
    epilogue = Epilogue(lowering, node)
    if epilogue.residual:
        lowering.pixel_of(epilogue.residual)
    macs = n * filters * weight.shape[1] * window.taps * math.prod(window.outputs)
    writer = lowering.start(node, macs=macs)
    x = writer.pointer(source)
    residual, strides = residual_of(lowering, writer, epilogue.residual, graph.shape(node.outputs[0]))
    y = lowering.write(writer, node.outputs[0], restrict=not strides)
    share_residual(lowering, writer, epilogue.residual, x, y)
    joined = _is_joined(window, n, source, y.view, strides)
    fields = {
        "images": 1 if joined else n,
        "rows": 1 if joined else window.outputs[0],
        "columns": n * math.prod(window.outputs) if joined else window.outputs[1],
        **reads,
        "lanes": lanes_of(y.view, lowering.vector),
        **pixel_strides("y", y.view),
        **strides,
    }
    parts = product_parts(lowering, writer, node, epilogue, fields, weight, depth, groups)
    kernel = "x".join(map(str, window.kernel))
    writer.step.kernel = f"convolution {kernel}, tile {parts.tile}"
    writer.line(f"static const fw_conv shape = {{{initialiser(parts.fields)}}};")
    pointers = f"{x.var}, {parts.constants}, {residual}, {y.var}"
    writer.line(f"{parts.function}(&shape, {pointers}, tid, threads);")


def _is_joined(window: Window, images: int, x: View, y: View, strides: dict[str, int]) -> bool:
    """Say whether all pixels of all images can run as one long row."""
    if window.taps != 1 or set(window.strides) != {1} or any(window.before) or any(window.after):
        return False
    rows, columns = window.outputs
    if strides and (strides["r_column"] == 0 or strides["r_row"] != columns * strides["r_column"]):
        return False
    if strides and images > 1 and strides["r_image"] != rows * strides["r_row"]:
        return False
    return all(
        view.strides[2] == columns * view.strides[3]
        and (images == 1 or view.strides[0] == rows * view.strides[2])
        for view in (x, y)
    )


@emits("Linear")
def emit_linear(lowering: Lowering, node: Node) -> None:
    """Rows of a row-major tensor times weights: a 1x1 convolution whose pixels are the rows."""
    graph = lowering.graph
    source = lowering.plain(node.inputs[0])
    depth, filters = graph.shape(node.inputs[1])
    rows = math.prod(graph.shape(node.inputs[0])[:-1])
    epilogue = Epilogue(lowering, node)
    rest = lowering.plain(epilogue.residual) if epilogue.residual else None
    writer = lowering.start(node, macs=rows * depth * filters)
    x = writer.pointer(source)
    residual = writer.pointer(rest, restrict=False).var if rest else "NULL"
    y = lowering.write(writer, node.outputs[0], restrict=not rest)
    if rest and rest.storage != source.storage:
        writer.step.in_place.append((y.view.storage, rest.storage))
    fields = {
        "images": 1,
        "rows": 1,
        "columns": rows,
        "tap_rows": 1,
        "tap_columns": 1,
        "x_column": depth,
        "y_column": filters,
        "r_column": filters if rest else 0,
        "lanes": (filters - 1) % lowering.vector + 1,
    }
    weight = np.ascontiguousarray(graph.constants[node.inputs[1]].T)[:, :, None, None]
    parts = product_parts(lowering, writer, node, epilogue, fields, weight, depth)
    writer.step.kernel = f"product, tile {parts.tile}"
    writer.line(f"static const fw_conv shape = {{{initialiser(parts.fields)}}};")
    pointers = f"{x.var}, {parts.constants}, {residual}, {y.var}"
    writer.line(f"{parts.function}(&shape, {pointers}, tid, threads);")
