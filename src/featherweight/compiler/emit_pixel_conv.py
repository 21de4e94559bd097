"""Convolutions in the pixel layout and products with weights, on the kernels of conv.h and depthwise.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from featherweight.compiler.emit_pixel import initialiser, literals, pixel_strides
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits, emits_pixel
from featherweight.compiler.pack import (
    conv_groups,
    conv_weights,
    depthwise_spans,
    depthwise_weights,
    pad_channels,
)
from featherweight.compiler.passes.layout import conv_border, is_depthwise
from featherweight.compiler.program import Operand, StepWriter, View
from featherweight.compiler.tiles import CACHE_BYTES, Tile, choose_tile, depthwise_outputs
from featherweight.compiler.vector_expressions import body_lines
from featherweight.compiler.windows import Window, conv_window


class Epilogue:
    """What follows a sum: the name of a macro-like function, the residual and the constants a channel.

    Args:
        lowering: the state of lowering.
        node: a convolution or `Linear`, with or without a fused body.
    """

    def __init__(self, lowering: Lowering, node: Node) -> None:
        self.lowering, self.node = lowering, node
        graph = lowering.graph
        extra = node.inputs[3:]
        self.residual = next((name for name in extra if graph.constant(name) is None), "")
        self.channel_constants = [name for name in extra if name != self.residual and graph.constants[name].size > 1]
        self.name = "FW_EPILOGUE_NONE"

    def define(self, vectors: int) -> None:
        """Emit the function; constants a channel lie one behind another, `vectors` vectors each."""
        body = self.node.attrs.get("body")
        if not body:
            return
        values = literals(self.lowering, self.node.inputs[3:], vector=True)
        lines = []
        for index, name in enumerate(self.channel_constants):
            lines.append(f"const vf c{index} = vf_load(aux + {index * vectors} * VL);")
            values[name] = f"c{index}"
        values[self.node.attrs["sum"]] = "sum"
        if self.residual:
            values[self.residual] = "r"
        lines += body_lines(self.lowering.graph, body, values)
        text = "\n".join(f"    {line}" for line in lines)
        result = values[body[-1].outputs[0]]
        self.lowering.program.need_math(text)
        self.name = self.lowering.program.define_named(
            "fw_epilogue",
            "FW_INLINE vf {name}(vf sum, vf r, const float *aux) {\n"
            f"    (void)r, (void)aux;\n{text}\n    return {result};\n}}",
        )

    def aux(self, writer: StepWriter, vectors: int, lanes: int) -> str:
        """Declare the constants a channel and return their pointer, NULL without any."""
        if not self.channel_constants:
            return "NULL"
        values = [pad_channels(self.lowering.graph.constants[name].reshape(-1), lanes) for name in self.channel_constants]
        return writer.constant(np.concatenate(values)).var


def _headers(lowering: Lowering, *names: str) -> None:
    for name in ("vector.h", *names):
        lowering.program.need_header(name)


def _bias(lowering: Lowering, writer: StepWriter, node: Node, channels: int) -> Operand:
    value = lowering.graph.constant(node.input(2))
    value = np.zeros(channels, np.float32) if value is None else value
    return writer.constant(pad_channels(value.reshape(-1), lowering.vector))


@emits_pixel("Conv")
def emit_pixel_conv(lowering: Lowering, node: Node) -> None:
    """Depthwise on its own kernel, everything else as a product of matrices."""
    graph = lowering.graph
    shape, outputs = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    window = conv_window(node.attrs, graph.shape(node.inputs[1])[2:], shape[2:], outputs[2:])
    if is_depthwise(graph, node):
        most = depthwise_outputs(window.kernel[1], window.strides[1], window.dilations[1], lowering.vector)
        if most:
            _emit_depthwise(lowering, node, window, most)
            return
    _emit_dense(lowering, node, window)


def _residual(lowering: Lowering, writer: StepWriter, name: str, shape: Sequence[int]) -> tuple[str, dict[str, int]]:
    """Declare the residual; one value a channel repeats over the pixels."""
    if not name:
        return "NULL", {}
    view = lowering.pixel_of(name)
    strides = pixel_strides("r", view)
    if view.shape[2:] == (1, 1) and tuple(shape[2:]) != (1, 1):
        strides |= {"r_row": 0, "r_column": 0}
    return writer.pointer(view, restrict=False).var, strides


def _emit_depthwise(lowering: Lowering, node: Node, window: Window, most: int) -> None:
    _headers(lowering, "conv.h", "depthwise.h")
    vl, program = lowering.vector, lowering.program
    n, channels, _, _ = lowering.graph.shape(node.inputs[0])
    source = lowering.pixel_of(node.inputs[0])
    epilogue = Epilogue(lowering, node)
    if epilogue.residual:
        lowering.pixel_of(epilogue.residual)
    vectors = -(-channels // vl)
    macs = n * channels * window.taps * math.prod(window.outputs)
    writer = lowering.start(node, "depthwise", macs)
    epilogue.define(vectors)
    x = writer.pointer(source)
    weight = lowering.graph.constants[node.inputs[1]]
    w = writer.constant(depthwise_weights(weight, vl))
    bias = _bias(lowering, writer, node, channels)
    aux = epilogue.aux(writer, vectors, vl)
    residual, strides = _residual(lowering, writer, epilogue.residual, lowering.graph.shape(node.outputs[0]))
    y = lowering.write(writer, node.outputs[0])
    width, stride, dilation = window.kernel[1], window.strides[1], window.dilations[1]
    spans = depthwise_spans(
        window.outputs[1], window.inputs[1], width, stride, dilation, window.before[1], most
    )
    rows = []
    for span in spans:
        arguments = f"{width}, {stride}, {dilation}, {span.outputs}, {span.low}, {span.high}, {epilogue.name}"
        name = program.define_named(
            "fw_dw", f"FW_DEFINE_DEPTHWISE_TILE({{name}}, {arguments}, {int(bool(epilogue.residual))})"
        )
        rows.append(
            f"{{{name}, {span.count}, {span.column}, {span.columns}, {span.in_column}, {span.in_columns}}}"
        )
    fields = {
        "images": n,
        "rows": window.outputs[0],
        "in_rows": window.inputs[0],
        "tap_rows": window.kernel[0],
        "tap_columns": width,
        "stride_rows": window.strides[0],
        "dilation_rows": window.dilations[0],
        "pad_top": window.before[0],
        "vectors": vectors,
        "lanes": _lanes(y.view, vl),
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
        **strides,
    }
    writer.step.kernel = f"depthwise {window.kernel[0]}x{width}, tile {spans[len(spans) // 2].outputs}"
    writer.line(f"static const fw_depthwise shape = {{{initialiser(fields)}}};")
    writer.line(f"static const fw_depthwise_span spans[] = {{{', '.join(rows)}}};")
    pointers = f"{x.var}, {w.var}, {bias.var}, {aux}, {residual}, {y.var}"
    writer.line(f"fw_depthwise_run(&shape, spans, {len(spans)}, {pointers}, tid, threads);")


def _lanes(view: View, vector: int) -> int:
    """Return how many lanes of the last vector may be stored."""
    return (view.padded_channels(vector) - 1) % vector + 1


def _emit_dense(lowering: Lowering, node: Node, window: Window) -> None:
    """Any convolution whose groups are few: a product whose rows are output columns."""
    graph, vl = lowering.graph, lowering.vector
    n, channels, _, _ = graph.shape(node.inputs[0])
    weight = graph.constants[node.inputs[1]]
    filters, groups = weight.shape[0], node.attrs.get("group", 1)
    border = conv_border(graph, node)
    tight = channels <= 4 and node.inputs[0] not in lowering.pixel
    source = lowering.pixel_of(node.inputs[0], border=border, tight=tight)
    epilogue = Epilogue(lowering, node)
    if epilogue.residual:
        lowering.pixel_of(epilogue.residual)
    macs = n * filters * weight.shape[1] * window.taps * math.prod(window.outputs)
    writer = lowering.start(node, "convolution", macs)
    vectors = -(-filters // vl)
    epilogue.define(vectors)
    offset = source.offset - border[0] * source.strides[2] - border[1] * source.strides[3]
    x = writer.pointer(replace(source, offset=offset))
    residual, strides = _residual(lowering, writer, epilogue.residual, graph.shape(node.outputs[0]))
    y = lowering.write(writer, node.outputs[0])
    joined = _is_joined(window, n, source, y.view, strides)
    columns = n * math.prod(window.outputs) if joined else window.outputs[1]
    fields = {
        "images": 1 if joined else n,
        "rows": 1 if joined else window.outputs[0],
        "columns": columns,
        "tap_rows": window.kernel[0],
        "tap_columns": window.kernel[1],
        "x_image": source.strides[0],
        "x_row": source.strides[2] * window.strides[0],
        "x_column": source.strides[3] * window.strides[1],
        "x_tap_row": source.strides[2] * window.dilations[0],
        "x_tap_column": source.strides[3] * window.dilations[1],
        **pixel_strides("y", y.view),
        **strides,
    }
    depth = channels
    if source.strides[3] == channels and groups == 1 and window.dilations[1] == 1:
        # The taps of a row lie one behind another: one long tap.
        depth, fields["tap_columns"] = channels * window.kernel[1], 1
    _emit_product(
        lowering, writer, node, epilogue, fields, weight, depth, groups, (x.var, residual, y.var), _lanes(y.view, vl)
    )


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
        view.strides[2] == columns * view.strides[3] and (images == 1 or view.strides[0] == rows * view.strides[2])
        for view in (x, y)
    )


def _emit_product(
    lowering: Lowering,
    writer: StepWriter,
    node: Node,
    epilogue: Epilogue,
    fields: dict[str, int],
    weight: np.ndarray,
    depth: int,
    groups: int,
    pointers: tuple[str, str, str],
    lanes: int,
) -> None:
    """Choose the tile, pack the weights and call the kernel."""
    _headers(lowering, "conv.h")
    vl, filters = lowering.vector, weight.shape[0]
    vectors = -(-filters // vl)
    tile = choose_tile(fields["columns"], vectors, vl)
    grouping = conv_groups(filters, weight.shape[1] * groups, groups, vl, tile.vectors)
    first = "NULL"
    if grouping.first is not None:
        first = "first"
        writer.line(f"static const int first[] = {{{', '.join(map(str, grouping.first))}}};")
        depth = grouping.depth
    w = writer.constant(conv_weights(weight, vl, tile.vectors, groups))
    bias = _bias(lowering, writer, node, filters)
    aux = epilogue.aux(writer, vectors, vl)
    fields |= {"depth": depth, "vectors": vectors, "lanes": lanes, **_blocks(fields, tile, vectors)}
    function = lowering.program.define_named(
        "fw_conv",
        f"FW_DEFINE_CONV({{name}}, {tile.rows}, {tile.vectors}, {tile.last}, {epilogue.name}, "
        f"{int(bool(epilogue.residual))})",
    )
    kernel = "x".join(map(str, weight.shape[2:]))
    writer.step.kernel = f"convolution {kernel}, tile {tile.rows}x{tile.vectors}"
    writer.line(f"static const fw_conv shape = {{{initialiser(fields)}, .first = {first}}};")
    x, residual, y = pointers
    writer.line(f"{function}(&shape, {x}, {w.var}, {bias.var}, {aux}, {residual}, {y}, tid, threads);")


def _blocks(fields: dict[str, int], tile: Tile, vectors: int) -> dict[str, int]:
    """Return the unit of work: activations that fit the cache, all groups of weights where rows are many."""
    groups = -(-vectors // tile.vectors)
    pixel_bytes = max(fields["x_column"] * 4, 1)
    columns = max(CACHE_BYTES // pixel_bytes // tile.rows, 1) * tile.rows
    if columns < fields["columns"]:
        return {"block_rows": 1, "block_columns": columns, "block_groups": groups}
    rows = min(max(CACHE_BYTES // (pixel_bytes * fields["columns"]), 1), fields["rows"])
    few = fields["rows"] * fields["images"] == 1 and fields["columns"] < 4 * tile.rows
    return {"block_rows": rows, "block_columns": fields["columns"], "block_groups": 1 if few else groups}


@emits("Linear")
def emit_linear(lowering: Lowering, node: Node) -> None:
    """Rows of a row-major tensor times weights: a 1x1 convolution whose pixels are the rows."""
    graph = lowering.graph
    source = lowering.plain(node.inputs[0])
    depth, filters = graph.shape(node.inputs[1])
    rows = math.prod(graph.shape(node.inputs[0])[:-1])
    epilogue = Epilogue(lowering, node)
    rest = lowering.plain(epilogue.residual) if epilogue.residual else None
    writer = lowering.start(node, "product", rows * depth * filters)
    epilogue.define(-(-filters // lowering.vector))
    x = writer.pointer(source)
    residual = writer.pointer(rest, restrict=False).var if rest else "NULL"
    y = lowering.write(writer, node.outputs[0])
    fields = {
        "images": 1,
        "rows": 1,
        "columns": rows,
        "tap_rows": 1,
        "tap_columns": 1,
        "x_column": depth,
        "y_column": filters,
        "r_column": filters if rest else 0,
    }
    weight = np.ascontiguousarray(graph.constants[node.inputs[1]].T)[:, :, None, None]
    lanes = (filters - 1) % lowering.vector + 1
    _emit_product(
        lowering, writer, node, epilogue, fields, weight, depth, 1, (x.var, residual, y.var), lanes
    )

