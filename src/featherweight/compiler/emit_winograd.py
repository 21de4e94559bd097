"""Dense 3x3 convolutions by Winograd's F(4x4, 3x3) on the kernels of winograd.h and conv.h."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from featherweight.compiler.conv_parts import Epilogue, bias_of, define_conv, headers, initialiser, lanes_of
from featherweight.compiler.emit_pixel import pixel_strides
from featherweight.compiler.emit_pixel_conv import residual_of, share_residual
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering
from featherweight.compiler.pack_winograd import winograd_weights
from featherweight.compiler.passes.layout import conv_border
from featherweight.compiler.tiles import rank_tiles
from featherweight.compiler.windows import Window

RUN = 28
"""Windows of a run: two passes of the widest tile, whose sums stay in a second-level cache."""


def emit_winograd(lowering: Lowering, node: Node, window: Window) -> None:
    """Transform runs of windows, multiply by 36 matrices, transform back."""
    graph, vl = lowering.graph, lowering.vector
    n, channels, _, _ = graph.shape(node.inputs[0])
    weight = graph.constants[node.inputs[1]]
    filters, (rows, columns) = len(weight), window.outputs
    border = conv_border(graph, node)
    source = lowering.pixel_of(node.inputs[0], border=border)
    epilogue = Epilogue(lowering, node)
    if epilogue.residual:
        lowering.pixel_of(epilogue.residual)
    headers(lowering, "conv.h", "winograd.h")
    writer = lowering.start(node, macs=n * weight.size * rows * columns)
    offset = source.offset - border[0] * source.strides[2] - border[1] * source.strides[3]
    x = writer.pointer(replace(source, offset=offset))
    residual, strides = residual_of(lowering, writer, epilogue.residual, graph.shape(node.outputs[0]))
    y = lowering.write(writer, node.outputs[0], restrict=not strides)
    share_residual(lowering, writer, epilogue.residual, x, y)
    vectors, depth = -(-filters // vl), -(-channels // vl) * vl
    epilogue.define(vectors)
    windows = n * math.ceil(rows / 4) * math.ceil(columns / 4)
    runs = -(-math.ceil(windows / RUN) // lowering.threads) * lowering.threads
    tiles = math.ceil(windows / runs)
    tile = rank_tiles(tiles, vectors, vl)[0]
    packed = winograd_weights(weight, vl, tile.vectors)
    product = {
        **{"images": 1, "rows": 1, "columns": tiles, "tap_rows": 1, "tap_columns": 1, "depth": channels},
        **{"vectors": vectors, "lanes": vl, "block_rows": 1, "block_columns": tiles},
        **{"block_groups": -(-vectors // tile.vectors), "x_column": depth, "y_column": vectors * vl},
    }
    shape = {
        **{"images": n, "rows": rows, "columns": columns, "tiles": tiles, "depth": depth},
        **{"out_vectors": vectors, "lanes": lanes_of(y.view, vl), "panel": packed.shape[1]},
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
        **strides,
    }
    multiply = define_conv(lowering.program, tile)
    function = lowering.program.define_named(
        "fw_winograd",
        f"FW_DEFINE_WINOGRAD({{name}}, {multiply}, {epilogue.name}, {int(bool(epilogue.residual))})",
    )
    scratch = writer.scratch("float32", 36 * tiles * (depth + vectors * vl) * lowering.threads + vl)
    w, zeros = writer.constant(packed), writer.constant(np.zeros(vectors * vl, np.float32))
    bias, aux = bias_of(lowering, writer, node, filters), epilogue.aux(writer, vectors, vl)
    writer.step.kernel = f"winograd 3x3, tile {tile.rows}x{tile.vectors}"
    writer.line(f"static const fw_conv product = {{{initialiser(product)}, .first = NULL}};")
    writer.line(f"static const fw_winograd shape = {{{initialiser(shape)}}};")
    pointers = f"{x.var}, {w.var}, {zeros.var}, {bias.var}, {aux}, {residual}, {y.var}, {scratch.var}"
    writer.line(f"{function}(&shape, &product, {pointers}, tid, threads);")
