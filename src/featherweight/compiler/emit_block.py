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
from featherweight.compiler.emit_pixel_conv import dense_reads
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits_pixel
from featherweight.compiler.program import StepWriter, View
from featherweight.compiler.tiles import depthwise_outputs
from featherweight.compiler.windows import Window, conv_window

SCRATCH_BYTES = 5 * 2**17
"""What lies between the layers of a strip: a third of a second-level cache of 2 MB, where that gains most."""

MOST_ROWS = 8
"""More rows of a strip share too few lines of its band to matter."""


@emits_pixel("Block")
def emit_block(lowering: Lowering, node: Node) -> None:
    """The layers as they would be alone, and the struct that joins them."""
    graph, vl = lowering.graph, lowering.vector
    expand, middle, project = (node.attrs[name] for name in ("expand", "depthwise", "project"))
    headers(lowering, "conv.h", "depthwise.h", "fused.h")
    window = _window(lowering, middle)
    if expand:
        source, reads, depth = _expansion(lowering, expand)
    else:
        source = lowering.own_pixels(node.inputs[0])
    end = Epilogue(lowering, project) if project else None
    residual = lowering.own_pixels(end.residual) if end and end.residual else None
    writer = lowering.start(node, macs=_macs(lowering, node, source.shape[0], window))
    x = writer.pointer(source)
    r = writer.pointer(residual, restrict=False).var if residual else "NULL"
    y = lowering.write(writer, node.outputs[0], restrict=not residual)
    step = lowering.channel_step(len(graph.constants[middle.inputs[1]]), source.dtype)
    width, out_width = window.inputs[1], window.outputs[1]
    one_row = {"images": 1, "rows": 1}
    parts = {}
    if expand:
        weight = graph.constants[expand.inputs[1]]
        fields = {**one_row, "columns": width, "lanes": vl, **reads, "y_column": step}
        epilogue = Epilogue(lowering, expand)
        parts["expand"] = product_parts(lowering, writer, expand, epilogue, fields, weight, depth)
    inner = {"images": source.shape[0], "lanes": vl if project else lanes_of(y.view, vl)}
    inner |= {"x_row": width * step, "x_column": step} if expand else pixel_strides("x", source)
    inner |= {"y_row": out_width * step, "y_column": step} if project else pixel_strides("y", y.view)
    most = depthwise_outputs(window.kernel[1], window.strides[1], window.dilations[1], vl)
    parts["depthwise"] = depthwise_parts(
        lowering, writer, middle, Epilogue(lowering, middle), window, most, inner
    )
    if project:
        weight = graph.constants[project.inputs[1]]
        fields = {**one_row, "columns": out_width, "tap_rows": 1, "tap_columns": 1}
        fields |= {"lanes": lanes_of(y.view, vl), "x_column": step}
        fields |= {"y_image": y.strides[0], "y_column": y.strides[3]}
        if residual:
            fields |= {"r_image": residual.strides[0], "r_column": residual.strides[3]}
        parts["project"] = product_parts(lowering, writer, project, end, fields, weight, weight.shape[1])
    # The time of the block tells nothing about the tile of its last layer.
    writer.step.tile_key = ""
    _call(lowering, writer, parts, window, step, (x.var, r, y.var))


def _window(lowering: Lowering, node: Node) -> Window:
    shapes = (lowering.graph.shape(name)[2:] for name in (node.inputs[1], node.inputs[0], node.outputs[0]))
    return conv_window(node.attrs, *shapes)


def _expansion(lowering: Lowering, node: Node) -> tuple[View, dict[str, int], int]:
    """Return what `dense_reads` does for the first layer; a plain 1x1 reads pixels without gaps."""
    window = _window(lowering, node)
    if window.taps == 1 and set(window.strides) == {1} and not any((*window.before, *window.after)):
        source = lowering.own_pixels(node.inputs[0])
        fields = {
            "tap_rows": 1,
            "tap_columns": 1,
            "x_image": source.strides[0],
            "x_column": source.strides[3],
        }
        return source, fields, source.shape[1]
    return dense_reads(lowering, node, window)


def _macs(lowering: Lowering, node: Node, images: int, window: Window) -> int:
    sides = {"expand": window.inputs, "depthwise": window.outputs, "project": window.outputs}
    parts = [(node.attrs[name], math.prod(side)) for name, side in sides.items() if node.attrs[name]]
    return images * sum(lowering.graph.constants[part.inputs[1]].size * size for part, size in parts)


def strip_rows(window: Window, step: int, expands: bool, projects: bool) -> tuple[int, int]:
    """Return a strip's output rows, so that what lies between the layers fits the cache, and its floats."""
    reach = (window.kernel[0] - 1) * window.dilations[0] + 1

    def floats(count: int) -> int:
        band = (count - 1) * window.strides[0] + reach if expands else 0
        return (band * window.inputs[1] + projects * count * window.outputs[1]) * step

    rows = 1
    while rows < min(window.outputs[0], MOST_ROWS) and 4 * floats(rows + 1) <= SCRATCH_BYTES:
        rows += 1
    return rows, floats(rows)


def _call(
    lowering: Lowering,
    writer: StepWriter,
    parts: dict[str, Parts],
    window: Window,
    step: int,
    pointers: tuple[str, str, str],
) -> None:
    """Declare the structs and scratch memory, and call the block's kernel."""
    rows, floats = strip_rows(window, step, "expand" in parts, "project" in parts)
    # A depthwise layer reads whole vectors at the end of its band.
    scratch = writer.scratch("float32", floats * lowering.threads + lowering.vector)
    for name, kind in (("expand", "fw_conv"), ("depthwise", "fw_depthwise"), ("project", "fw_conv")):
        if name in parts:
            writer.line(f"static const {kind} {name} = {{{initialiser(parts[name].fields)}}};")
    structs = ", ".join(f"&{name}" if name in parts else "NULL" for name in ("expand", "project"))
    functions = ", ".join(parts[name].function if name in parts else "NULL" for name in ("expand", "project"))
    # Columns of the 1x1 layers that pass while a group's weights stay in the first cache.
    columns = 64
    writer.line(
        f"static const fw_block block = {{{structs}, {functions}, &depthwise, spans, "
        f"{parts['depthwise'].function}, {rows}, {columns}}};"
    )
    x, r, y = pointers
    constants = ", ".join(
        parts[name].constants if name in parts else "NULL, NULL, NULL"
        for name in ("expand", "depthwise", "project")
    )
    writer.line(f"const fw_block_data data = {{{x}, {r}, {y}, {constants}}};")
    names = ", ".join(f"{part.tile}" for part in parts.values())
    writer.step.kernel = f"block of {rows} rows, tiles {names}"
    writer.line(f"fw_inverted(&block, &data, {scratch.var}, tid, threads);")
