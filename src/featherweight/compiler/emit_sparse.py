"""1x1 convolutions with mostly zero weights and the depthwise ones between them: vectors run over pixels."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.conv_parts import Epilogue, headers, initialiser
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering
from featherweight.compiler.pack_sparse import SparseWeights, best_rows, sparse_weights
from featherweight.compiler.program import Operand, StepWriter
from featherweight.compiler.tiles import registers
from featherweight.compiler.windows import Window, conv_window


def emit_sparse_conv(lowering: Lowering, node: Node) -> None:
    """A 1x1 convolution as one walk over its nonzero weights for every stripe of pixels."""
    graph = lowering.graph
    source = lowering.plain(node.inputs[0])
    n, channels, height, width = source.shape
    weight = graph.constants[node.inputs[1]][:, :, 0, 0]
    filters, plane = len(weight), height * width
    epilogue = Epilogue(lowering, node, planar=True)
    rest = lowering.plain(epilogue.residual) if epilogue.residual else None
    headers(lowering, "conv.h", "sparse.h")
    writer = lowering.start(node, macs=n * int((weight != 0).sum()) * plane)
    epilogue.define(filters)
    x = writer.pointer(source)
    aux = epilogue.aux(writer, filters, 1)
    residual = writer.pointer(rest, restrict=False).var if rest else "NULL"
    y = lowering.write(writer, node.outputs[0], restrict=not rest)
    if rest and rest.storage != source.storage:
        writer.step.in_place.append((y.view.storage, rest.storage))
    zeros = 1 - (weight != 0).mean()
    writer.step.kernel = f"sparse 1x1, {zeros:.0%} zeros"
    bias = graph.constant(node.input(2))
    fields = {"images": n, "pixels": plane, "x_image": channels * plane, "y_image": filters * plane}
    fields |= {"y_plane": plane, "r_image": filters * plane, "r_plane": plane}
    for index, part in enumerate(sparse_weights(weight, bias, plane, best_rows(weight))):
        call = f"{x.var}, {aux}, {residual}, {y.var}, tid, threads);"
        _emit_part(lowering, writer, epilogue, part, fields, index, call)


def _emit_part(
    lowering: Lowering,
    writer: StepWriter,
    epilogue: Epilogue,
    part: SparseWeights,
    fields: dict[str, int | str],
    index: int,
    call: str,
) -> None:
    """Run one packed part of the matrix."""
    vectors = -(-int(fields["pixels"]) // lowering.vector)
    wide = stripe_vectors(vectors, part.rows_per_block, lowering.vector)
    last = vectors % wide or wide
    function = lowering.program.define_named(
        "fw_sparse",
        f"FW_DEFINE_SPARSE({{name}}, {wide}, {last}, {part.rows_per_block}, {epilogue.name}, "
        f"{int(bool(epilogue.residual))})",
    )
    arrays = {
        name: writer.constant(value).var
        for name, value in (
            ("values", part.values),
            ("offset", part.offset),
            ("start", part.start),
            ("row", part.row),
        )
    }
    struct = {**fields, "blocks": len(part.row), **arrays}
    writer.line(f"const fw_sparse shape{index} = {{{initialiser(struct)}}};")
    writer.line(f"{function}(&shape{index}, {call}")


def stripe_vectors(vectors: int, rows: int, vector: int) -> int:
    """Return the vectors of pixels of a stripe: as many as the registers hold, with little left over."""
    most = max(1, min(14, (registers(vector) - rows - 1) // rows, vectors))
    least = max(1, most // 2)
    return min(range(most, least - 1, -1), key=lambda wide: (-(-vectors // wide) * wide, -wide))


def emit_planar_depthwise(lowering: Lowering, node: Node) -> None:
    """A depthwise convolution whose vectors run over the pixels of a row."""
    graph = lowering.graph
    window = planar_window(lowering, node)
    source = lowering.plain(node.inputs[0])
    n, channels, _, _ = source.shape
    epilogue = Epilogue(lowering, node, planar=True)
    headers(lowering, "conv.h", "planar.h")
    writer = lowering.start(node, macs=n * channels * window.taps * math.prod(window.outputs))
    epilogue.define(channels)
    x = writer.pointer(source)
    w = writer.constant(graph.constants[node.inputs[1]].reshape(-1))
    bias = writer.constant(_bias(graph.constant(node.input(2)), channels))
    aux = epilogue.aux(writer, channels, 1)
    y: Operand = lowering.write(writer, node.outputs[0])
    rows = max(1, min(window.outputs[0], 7, registers(lowering.vector) - window.taps - 2))
    function = lowering.program.define_named(
        "fw_planar",
        f"FW_DEFINE_PLANAR_DEPTHWISE({{name}}, {window.kernel[0]}, {window.kernel[1]}, {window.strides[0]}, "
        f"{rows}, {epilogue.name})",
    )
    fields = {
        "images": n,
        "channels": channels,
        "rows": window.outputs[0],
        "columns": window.outputs[1],
        "in_rows": window.inputs[0],
        "in_columns": window.inputs[1],
        "pad_top": window.before[0],
        "pad_left": window.before[1],
    }
    writer.step.kernel = f"planar depthwise {window.kernel[0]}x{window.kernel[1]}"
    writer.line(f"static const fw_planar shape = {{{initialiser(fields)}}};")
    writer.line(f"{function}(&shape, {x.var}, {w.var}, {bias.var}, {aux}, {y.var}, tid, threads);")


def _bias(value: np.ndarray | None, channels: int) -> np.ndarray:
    return np.zeros(channels, np.float32) if value is None else value.reshape(-1)


def planar_window(lowering: Lowering, node: Node) -> Window:
    """Return the geometry of a convolution."""
    graph = lowering.graph
    return conv_window(
        node.attrs,
        graph.shape(node.inputs[1])[2:],
        graph.shape(node.inputs[0])[2:],
        graph.shape(node.outputs[0])[2:],
    )
