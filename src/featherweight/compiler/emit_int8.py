"""Integer convolutions on the kernels of int8.h and int8_depthwise.h: bytes in, sums in 32 bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from featherweight.compiler.conv_parts import initialiser
from featherweight.compiler.ctype import CType
from featherweight.compiler.emit_pixel import pixel_strides
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits, emits_pixel
from featherweight.compiler.pack_int8 import (
    blocks_of,
    conv_bias,
    conv_weights,
    depthwise_scratch,
    depthwise_weights,
    requantise,
)
from featherweight.compiler.program import Operand, StepWriter, View
from featherweight.compiler.windows import Window, conv_window

BYTE_LANES = 16
FLOAT = CType(np.dtype(np.float32))
SMALL_WEIGHTS = 2**17
"""Bytes of weights that stay in the cache while tiles of columns pass over them."""


def headers(lowering: Lowering, *names: str) -> None:
    """Include the 8-bit kernels."""
    for name in ("int8_narrow.h", "int8_vector.h", *names):
        lowering.program.need_header(name)


def _out_mode(node: Node) -> tuple[str, dict[str, int], dict[str, str]]:
    """Return the kernel's way out, its integer fields and its other fields."""
    attrs = node.attrs
    if attrs["y"] is None:
        limits = {"real_lo": FLOAT.literal(attrs["low"]), "real_hi": FLOAT.literal(attrs["high"])}
        return "real", {}, limits
    if "sum" in attrs:
        return "add", *_sum_fields(attrs)
    scale, zero = attrs["y"]
    low = max(0, min(255, np.rint(attrs["low"] / scale) + zero)) if np.isfinite(attrs["low"]) else 0
    high = max(0, min(255, np.rint(attrs["high"] / scale) + zero)) if np.isfinite(attrs["high"]) else 255
    fields = {"zero": zero, "lo": int(low), "hi": int(high)}
    if "table" in attrs:
        return "table", fields, {}
    if (fields["lo"], fields["hi"]) == (0, 255):
        return ("relu" if zero == 0 else "shift"), fields, {}
    return "quantise", fields, {}


def _sum_fields(attrs: dict[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
    """Return the fields of a convolution that adds another map: scales over the result's."""
    total = attrs["sum"]
    (y_scale, zero), (q_scale, q_zero), (r_scale, r_zero) = total["y"], total["q"], total["r"]
    fields = {"zero": zero, "lo": total["low"], "hi": total["high"], "q_zero": q_zero, "r_zero": r_zero}
    ratios = {
        name: FLOAT.literal(np.float32(scale) / np.float32(y_scale))
        for name, scale in (("ratio", q_scale), ("r_ratio", r_scale))
    }
    return fields, ratios


class _Layer:
    """What dense and depthwise layers share: weights, bias, scale, table, the struct of the way out."""

    def __init__(self, lowering: Lowering, node: Node) -> None:
        self.lowering, self.node = lowering, node
        attrs = node.attrs
        self.weight: np.ndarray = attrs["weight"]
        self.filters = len(self.weight)
        self.mode, self.fields, self.limits = _out_mode(node)
        self.bias = conv_bias(self.weight, attrs["bias"], attrs["x"][1])
        y_scale = attrs["y"][0] if attrs["y"] else None
        self.scale = requantise(attrs["x"][0], attrs["w_scale"], y_scale, self.filters)

        self.residual = lowering.pixel_of(node.inputs[1]) if "sum" in attrs else None

    def residual_pointer(self, writer: StepWriter) -> str:
        """Declare the map that is added, NULL without one."""
        return writer.pointer(self.residual, restrict=False).var if self.residual else "NULL"

    def out(self, writer: StepWriter, strides: dict[str, int], lanes: int) -> str:
        """Return the struct `out`; the table's address is known only at run time."""
        fields = {"lanes": lanes, **strides, **self.fields, **self.limits}
        if self.residual:
            fields |= pixel_strides("r", self.residual)
        if self.mode == "table":
            table = writer.constant(self.node.attrs["table"])
            fields["table"] = table.var
        return f"{{{initialiser(fields)}}}"


@emits("QConv")
@emits_pixel("QConv")
def emit_quantised_conv(lowering: Lowering, node: Node) -> None:
    """Depthwise where every channel has a filter of its own, else a product."""
    shape = lowering.graph.shape(node.inputs[0])
    outputs = lowering.graph.shape(node.outputs[0])
    layer = _Layer(lowering, node)
    if node.attrs["rows"]:
        _emit_rows(layer, shape, outputs)
        return
    window = conv_window(node.attrs["conv"], layer.weight.shape[2:], shape[2:], outputs[2:])
    groups = node.attrs["conv"].get("group", 1)
    simple = window.dilations[1] == 1 and window.strides[1] in (1, 2, 4)
    if groups == shape[1] == layer.filters and groups > 1 and simple:
        _emit_depthwise(layer, window, shape)
    else:
        _emit_dense(layer, window, shape)


def byte_lanes(view: View) -> int:
    """Return how many outputs of the last block of 16 may be stored."""
    channels = view.padded_channels(BYTE_LANES)
    return (channels - 1) % BYTE_LANES + 1


def _lanes(view: View) -> int:
    """The same for a float32 result, whose pixels end with a whole vector."""
    if view.dtype == np.uint8:
        return byte_lanes(view)
    step = view.strides[3] if view.lanes_free else view.shape[1]
    return min(step, blocks_of(view.shape[1]) * BYTE_LANES) - (blocks_of(view.shape[1]) - 1) * BYTE_LANES


def _emit_depthwise(layer: _Layer, window: Window, shape: tuple[int, ...]) -> None:
    lowering, node = layer.lowering, layer.node
    headers(lowering, "int8.h", "int8_depthwise.h")
    source = lowering.pixel_of(node.inputs[0])
    macs = shape[0] * shape[1] * window.taps * math.prod(window.outputs)
    kernel = "x".join(map(str, window.kernel))
    writer = lowering.start(node, f"8-bit depthwise {kernel}", macs)
    x = writer.pointer(source)
    w, bias, scale = (
        writer.constant(value)
        for value in (depthwise_weights(layer.weight, window.strides[1]), layer.bias, layer.scale)
    )
    y = lowering.write(writer, node.outputs[0])
    size = depthwise_scratch(
        shape[1], window.outputs[1], window.kernel, window.strides[1], window.dilations[0]
    )
    size = -(-size // 64) * 64
    scratch = writer.scratch(np.uint8, size * lowering.threads)
    sizes = f"{window.kernel[0]}, {window.kernel[1]}, {window.strides[1]}"
    function = lowering.program.define_named(
        "fw_dw8", f"FW_DEFINE_INT8_DEPTHWISE({{name}}, {sizes}, {layer.mode})"
    )
    fields = {
        "images": shape[0],
        "rows": window.outputs[0],
        "columns": window.outputs[1],
        "in_rows": window.inputs[0],
        "in_columns": window.inputs[1],
        "stride_rows": window.strides[0],
        "dilation_rows": window.dilations[0],
        "pad_top": window.before[0],
        "pad_left": window.before[1],
        "blocks": blocks_of(shape[1]),
        "x_zero": node.attrs["x"][1],
        **pixel_strides("x", source),
        "out": layer.out(writer, pixel_strides("y", y.view), _lanes(y.view)),
    }
    writer.line(f"const fw_int8_depthwise shape = {{{initialiser(fields)}}};")
    residual = layer.residual_pointer(writer)
    pointers = f"{x.var}, {w.var}, {bias.var}, {scale.var}, {residual}, {y.var}, {scratch.var} + tid * {size}"
    writer.line(f"{function}(&shape, {pointers}, tid, threads);")


def _emit_dense(layer: _Layer, window: Window, shape: tuple[int, ...]) -> None:
    lowering, node = layer.lowering, layer.node
    groups = node.attrs["conv"].get("group", 1)
    source = padded_source(lowering, node, window)
    macs = shape[0] * layer.filters * layer.weight.shape[1] * window.taps * math.prod(window.outputs)
    kernel = "x".join(map(str, window.kernel))
    writer = lowering.start(node, f"8-bit convolution {kernel}", macs)
    x = writer.pointer(source)
    y = lowering.write(writer, node.outputs[0])
    views = [source, y.view, *([layer.residual] if layer.residual else [])]
    joined = window.taps == 1 and set(window.strides) == {1} and all(map(_is_dense, views))
    images, rows, columns = (
        (1, 1, shape[0] * math.prod(window.outputs)) if joined else (shape[0], *window.outputs)
    )
    fields = {
        "images": images,
        "rows": rows,
        "columns": columns,
        "tap_rows": window.kernel[0],
        "tap_columns": window.kernel[1],
        "x_image": source.strides[0],
        "x_row": source.strides[2] * window.strides[0],
        "x_column": source.strides[3] * window.strides[1],
        "x_tap_row": source.strides[2] * window.dilations[0],
        "x_tap_column": source.strides[3] * window.dilations[1],
    }
    weight = layer.weight
    if source.strides[3] == 4 and groups == 1 and window.dilations[1] == 1:
        # Four bytes a pixel: the taps of a row are one long tap.
        wide = np.zeros((layer.filters, 4, *window.kernel), np.int8)
        wide[:, : weight.shape[1]] = weight
        weight = wide.transpose(0, 3, 1, 2).reshape(layer.filters, -1, window.kernel[0], 1)
        fields["tap_columns"] = 1
    _call_product(layer, writer, fields, weight, groups, x, y, pixel_strides("y", y.view), _lanes(y.view))


def _is_dense(view: View) -> bool:
    n, _, h, w = view.shape
    image, _, row, column = view.strides
    return row == w * column and (n == 1 or image == h * row)


def _emit_rows(layer: _Layer, shape: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """A fully connected layer on row-major rows of features."""
    lowering, node = layer.lowering, layer.node
    rows, depth = math.prod(shape[:-1]), shape[-1]
    source = lowering.plain(node.inputs[0])
    writer = lowering.start(node, "8-bit product", rows * depth * layer.filters)
    x = writer.pointer(source)
    y = lowering.write(writer, node.outputs[0])
    fields = {"images": 1, "rows": 1, "columns": rows, "tap_rows": 1, "tap_columns": 1, "x_column": depth}
    lanes = (layer.filters - 1) % BYTE_LANES + 1
    _call_product(layer, writer, fields, layer.weight, 1, x, y, {"y_column": outputs[-1]}, lanes)


def _call_product(
    layer: _Layer,
    writer: StepWriter,
    fields: dict[str, int],
    weight: np.ndarray,
    groups: int,
    x: Operand,
    y: Operand,
    strides: dict[str, int],
    lanes: int,
) -> None:
    """Pack the weights, choose the tile and call the kernel."""
    lowering = layer.lowering
    headers(lowering, "int8.h")
    packed, first = conv_weights(weight, groups)
    blocks = blocks_of(layer.filters)
    wide = blocks if first is None else 1
    tile = lowering.choose_tile(writer, fields, packed.shape[3] * 4, wide, integer=True)
    w, bias, scale = (writer.constant(value) for value in (packed, layer.bias, layer.scale))
    function = lowering.program.define_named(
        "fw_conv8", f"FW_DEFINE_INT8_CONV({{name}}, {tile.rows}, {tile.vectors}, {tile.last}, {layer.mode})"
    )
    pointer = "NULL"
    if first is not None:
        pointer = "first"
        writer.line(f"static const int first[] = {{{', '.join(map(str, first))}}};")
    fields |= {
        "depth4": packed.shape[3],
        "blocks": blocks,
        "columns_first": int(packed.size <= SMALL_WEIGHTS),
        "first": pointer,
        "out": layer.out(writer, strides, lanes),
    }
    writer.step.kernel += f", tile {tile.rows}x{tile.vectors}"
    writer.line(f"const fw_int8_conv shape = {{{initialiser(fields)}}};")
    residual = layer.residual_pointer(writer)
    pointers = f"{x.var}, {w.var}, {bias.var}, {scale.var}, {residual}, {y.var}"
    writer.line(f"{function}(&shape, {pointers}, tid, threads);")


def padded_source(lowering: Lowering, node: Node, window: Window) -> View:
    """Return the input at the first tap, with the zero point around it where the layer pads."""
    name, zero = node.inputs[0], node.attrs["x"][1]
    border = (*window.before, *window.after)
    image = lowering.byte_images.get(name)
    if image is not None:
        return _emit_image(lowering, name, image, border, zero)
    if not any(border):
        return lowering.pixel_of(name)
    source = lowering.own_pixels(name)
    n, _c, h, w = source.shape
    step, top, left, bottom, right = source.strides[3], *border
    row = (left + w + right) * step
    size = (top + h + bottom) * row
    storage = lowering.program.allocate(n * size + 64)
    target = View(storage, source.dtype, source.shape, (size, 1, row, step), 0, pixel=True)
    headers(lowering, "int8_elementwise.h")
    writer = lowering.start(Node("Pad", f"{name} with a border", [name], [name]), "layout")
    x, y = writer.pointer(source), writer.pointer(target, writes=True)
    for image_index in range(n):
        at = f"{x.var} + {image_index * source.strides[0]}, {y.var} + {image_index * size}"
        writer.line(
            f"fw_u8_pad({at}, {h}, {w}, {step}, {top}, {left}, {bottom}, {right}, {zero}, tid, threads);"
        )
    return target


def _emit_image(
    lowering: Lowering, name: str, image: tuple[str, float], border: tuple[int, ...], zero: int
) -> View:
    """Quantise a row-major float32 image straight into bytes with a border, four a pixel."""
    source_name, scale = image
    source = lowering.plain(source_name)
    n, c, h, w = source.shape
    step = -(-c // 4) * 4
    top, left, bottom, right = border
    row = (left + w + right) * step
    size = (top + h + bottom) * row
    storage = lowering.program.allocate(n * size + 64)
    target = View(storage, np.dtype(np.uint8), source.shape, (size, 1, row, step), 0, pixel=True)
    headers(lowering, "int8_elementwise.h")
    writer = lowering.start(Node("QuantizeLinear", name, [source_name], [name]), "layout")
    x, y = writer.pointer(source), writer.pointer(target, writes=True)
    for index in range(n):
        at = f"{x.var} + {index * c * h * w}, {y.var} + {index * size}"
        sizes = f"{c}, {h}, {w}, {step}, {top}, {left}, {bottom}, {right}"
        writer.line(f"fw_u8_image({at}, {sizes}, {FLOAT.literal(scale)}, {zero}, tid, threads);")
    return target
