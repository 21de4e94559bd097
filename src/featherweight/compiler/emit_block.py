"""Fused blocks on the kernels of fused.h: 1x1, depthwise and 1x1 convolutions strip by strip."""

from __future__ import annotations

import math

from featherweight.compiler.conv_parts import (
    Epilogue,
    Parts,
    depthwise_parts,
    headers,
    initialiser,
    lanes_of,
    product_parts,
)
from featherweight.compiler.emit_pixel import pixel_strides
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits_pixel
from featherweight.compiler.program import StepWriter
from featherweight.compiler.tiles import depthwise_outputs
from featherweight.compiler.windows import Window, conv_window

SCRATCH_BYTES = 5 * 2**17
"""What lies between the layers of a strip: a third of a second-level cache of 2 MB, where that gains most."""

MOST_ROWS = 8
"""More rows of a strip share too few lines of its band to matter."""


def _pointwise(
    lowering: Lowering, writer: StepWriter, node: Node, epilogue: Epilogue, fields: dict[str, int]
) -> Parts:
    """Return the parts of a 1x1 layer; its tile must fit into one row of pixels."""
    weight = lowering.graph.constants[node.inputs[1]]
    one_row = {"images": 1, "rows": 1, "tap_rows": 1, "tap_columns": 1, **fields}
    return product_parts(lowering, writer, node, epilogue, one_row, weight, weight.shape[1])


@emits_pixel("Block")
def emit_block(lowering: Lowering, node: Node) -> None:
    """The three layers as they would be alone, and the struct that joins them."""
    graph, vl = lowering.graph, lowering.vector
    expand, middle, project = (node.attrs[name] for name in ("expand", "depthwise", "project"))
    headers(lowering, "conv.h", "depthwise.h", "fused.h")
    source = lowering.own_pixels(node.inputs[0])
    window = conv_window(
        middle.attrs,
        graph.shape(middle.inputs[1])[2:],
        graph.shape(middle.inputs[0])[2:],
        graph.shape(middle.outputs[0])[2:],
    )
    end = Epilogue(lowering, project)
    residual = lowering.own_pixels(end.residual) if end.residual else None
    writer = lowering.start(node, macs=_macs(lowering, node, source.shape[0], window))
    x = writer.pointer(source)
    r = writer.pointer(residual, restrict=False).var if residual else "NULL"
    y = lowering.write(writer, node.outputs[0], restrict=not residual)
    step = lowering.channel_step(len(graph.constants[middle.inputs[1]]), source.dtype)
    width, out_width = window.inputs[1], window.outputs[1]
    parts = {}
    if expand:
        fields = {
            "columns": width,
            "lanes": vl,
            "x_image": source.strides[0],
            "x_column": source.strides[3],
            "y_column": step,
        }
        parts["expand"] = _pointwise(lowering, writer, expand, Epilogue(lowering, expand), fields)
    inner = {"images": source.shape[0], "lanes": vl}
    inner |= pixel_strides("x", source) if not expand else {"x_row": width * step, "x_column": step}
    inner |= {"y_row": out_width * step, "y_column": step}
    most = depthwise_outputs(window.kernel[1], window.strides[1], window.dilations[1], vl)
    parts["depthwise"] = depthwise_parts(
        lowering, writer, middle, Epilogue(lowering, middle), window, most, inner
    )
    fields = {
        "columns": out_width,
        "lanes": lanes_of(y.view, vl),
        "x_column": step,
        "y_image": y.strides[0],
        "y_column": y.strides[3],
    }
    if residual:
        fields |= {"r_image": residual.strides[0], "r_column": residual.strides[3]}
    parts["project"] = _pointwise(lowering, writer, project, end, fields)
    _call(lowering, writer, parts, window, step, (x.var, r, y.var))


def _macs(lowering: Lowering, node: Node, images: int, window: Window) -> int:
    sizes = [
        lowering.graph.constants[part.inputs[1]].size
        for part in (node.attrs["depthwise"], node.attrs["project"])
    ]
    total = sum(sizes) * math.prod(window.outputs)
    if node.attrs["expand"]:
        total += lowering.graph.constants[node.attrs["expand"].inputs[1]].size * math.prod(window.inputs)
    return images * total


def strip_rows(window: Window, step: int, expands: bool) -> int:
    """Return how many output rows a strip has, so that what lies between the layers fits the cache."""
    rows = 1
    reach = (window.kernel[0] - 1) * window.dilations[0] + 1

    def size(count: int) -> int:
        band = (count - 1) * window.strides[0] + reach if expands else 0
        return (band * window.inputs[1] + count * window.outputs[1]) * step * 4

    while rows < min(window.outputs[0], MOST_ROWS) and size(rows + 1) <= SCRATCH_BYTES:
        rows += 1
    return rows


def _call(
    lowering: Lowering,
    writer: StepWriter,
    parts: dict[str, Parts],
    window: Window,
    step: int,
    pointers: tuple[str, str, str],
) -> None:
    """Declare the structs and scratch memory, and call the block's kernel."""
    expands = "expand" in parts
    rows = strip_rows(window, step, expands)
    band = (rows - 1) * window.strides[0] + (window.kernel[0] - 1) * window.dilations[0] + 1 if expands else 0
    floats = (band * window.inputs[1] + rows * window.outputs[1]) * step
    # A depthwise layer reads whole vectors at the end of its band.
    scratch = writer.scratch("float32", floats * lowering.threads + lowering.vector)
    for name, kind in (("expand", "fw_conv"), ("depthwise", "fw_depthwise"), ("project", "fw_conv")):
        if name in parts:
            writer.line(f"static const {kind} {name} = {{{initialiser(parts[name].fields)}}};")
    first = f"&expand, &project, {parts['expand'].function}" if expands else "NULL, &project, NULL"
    # Columns of the 1x1 layers that pass while a group's weights stay in the first cache.
    columns = 64
    writer.line(
        f"static const fw_block block = {{{first}, {parts['project'].function}, &depthwise, spans, "
        f"{parts['depthwise'].function}, {rows}, {columns}}};"
    )
    x, r, y = pointers
    expand = parts["expand"].constants if expands else "NULL, NULL, NULL"
    writer.line(
        f"const fw_block_data data = {{{x}, {r}, {y}, {expand}, {parts['depthwise'].constants}, "
        f"{parts['project'].constants}}};"
    )
    names = ", ".join(f"{part.tile}" for part in parts.values())
    writer.step.kernel = f"block of {rows} rows, tiles {names}"
    writer.line(f"fw_inverted(&block, &data, {scratch.var}, tid, threads);")
