"""1x1 convolutions with mostly zero weights, alone or joined with the depthwise one behind them."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.conv_parts import Epilogue, headers, initialiser
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits_planar
from featherweight.compiler.pack_sparse import SparseWeights, plan_stripes, sparse_weights
from featherweight.compiler.passes.sparse import MIN_ZEROS
from featherweight.compiler.program import StepWriter, View
from featherweight.compiler.tiles import registers
from featherweight.compiler.windows import Window, conv_window

STRIP_INPUTS = 1024
"""Pixels of a channel that a strip of a joined layer covers: with them all channels stay near the core."""


@emits_planar("Conv")
def emit_planar_conv(lowering: Lowering, node: Node) -> None:
    """Call the emitter of the kind that the choice of regions gave to the node."""
    from featherweight.compiler.emit_planar import emit_planar_dense, emit_planar_depthwise

    kinds = {"sparse": emit_sparse_conv, "dense": emit_planar_dense, "depthwise": emit_planar_depthwise}
    kinds[node.attrs["planar"]](lowering, node)


def emit_sparse_conv(lowering: Lowering, node: Node) -> None:
    """One walk over the nonzero weights for every stripe of pixels."""
    source = lowering.planar_of(node.inputs[0])
    n, _, height, width = source.shape
    weight = lowering.graph.constants[node.inputs[1]][:, :, 0, 0]
    plane = source.strides[1]
    epilogue = Epilogue(lowering, node, planar=True)
    rest = lowering.planar_of(epilogue.residual) if epilogue.residual else None
    vectors = plane // lowering.vector
    plan = plan_stripes(weight, vectors, lowering.vector, registers(lowering.vector))
    headers(lowering, "conv.h", "sparse.h")
    writer = lowering.start(node, macs=n * int((weight != 0).sum()) * height * width)
    epilogue.define(len(weight))
    x = writer.pointer(source)
    aux = epilogue.aux(writer, len(weight), 1)
    residual = writer.pointer(rest, restrict=False).var if rest else "NULL"
    y = lowering.write(writer, node.outputs[0], restrict=not rest)
    if rest and rest.storage != source.storage and plan.groups == 1:
        writer.step.in_place.append((y.view.storage, rest.storage))
    wide = plan.vectors
    if lowering.threads > 1:
        # Stripes are shared before rows are: each thread reads all weights then, but a part of the pixels.
        wide = min(wide, max(4, -(-vectors // lowering.threads)))
    few = n * -(-vectors // wide) < 4 * lowering.threads
    writer.step.kernel = f"{_name(weight)} zeros" + _blocks(plan.rows)
    bias = lowering.graph.constant(node.input(2))
    parts = lowering.threads if few else 1
    packed = sparse_weights(weight, bias, plane, plan.rows, plan.groups, parts)
    fields = _fields(n, vectors, source, y.view) | {"groups": plan.groups}
    for index, rows in enumerate(sorted({part.rows_per_block for part in packed}, reverse=True)):
        own = [part for part in packed if part.rows_per_block == rows]
        part_table(writer, own, f"parts{index}")
        function = lowering.program.define_named(
            "fw_sparse",
            f"FW_DEFINE_SPARSE({{name}}, {wide}, {vectors % wide or wide}, {rows}, {epilogue.name}, "
            f"{int(bool(epilogue.residual))})",
        )
        writer.line(
            f"static const fw_sparse shape{index} = {{{initialiser({**fields, 'parts': len(own)})}}};"
        )
        pointers = f"{x.var}, {aux}, {residual}, {y.var}"
        writer.line(f"{function}(&shape{index}, parts{index}, {pointers}, tid, threads);")


def _name(weight: np.ndarray) -> str:
    zeros = 1 - (weight != 0).mean()
    return f"{'sparse' if zeros >= MIN_ZEROS else 'planar'} 1x1, {zeros:.0%}"


def _blocks(rows: int) -> str:
    return f", blocks of {rows}" if rows > 1 else ""


def _fields(images: int, vectors: int, x: View, y: View) -> dict[str, int | str]:
    return {
        "images": images,
        "vectors": vectors,
        "x_image": x.strides[0],
        "y_image": y.strides[0],
        "y_plane": y.strides[1],
        "r_image": y.strides[0],
        "r_plane": y.strides[1],
    }


def part_table(writer: StepWriter, parts: list[SparseWeights], name: str) -> None:
    """Declare the array of `fw_sparse_part` that a kernel reads."""
    rows = []
    for part in parts:
        arrays = (part.values, part.offset, part.count, part.row)
        rows.append(f"{{{part.blocks}, {', '.join(writer.constant(array).var for array in arrays)}}}")
    writer.line(f"const fw_sparse_part {name}[] = {{{', '.join(rows)}}};")


@emits_planar("SparseBlock")
def emit_sparse_block(lowering: Lowering, node: Node) -> None:
    """A sparse layer whose channels are convolved as they are made: one plane lies between the two."""
    graph = lowering.graph
    first, second = node.attrs["expand"], node.attrs["depthwise"]
    source = lowering.planar_of(node.inputs[0])
    n, _, height, width = source.shape
    weight = graph.constants[first.inputs[1]][:, :, 0, 0]
    window = planar_window(lowering, second)
    ends = [Epilogue(lowering, part, planar=True) for part in (first, second)]
    headers(lowering, "conv.h", "planar.h", "sparse.h", "sparse_region.h")
    plane = source.strides[1]
    macs = int((weight != 0).sum()) * height * width + len(weight) * window.taps * math.prod(window.outputs)
    writer = lowering.start(node, macs=n * macs)
    writer.step.kernel = f"{_name(weight)} zeros, with planar depthwise"
    for end in ends:
        end.define(len(weight))
    x = writer.pointer(source)
    aux = [end.aux(writer, len(weight), 1) for end in ends]
    w = writer.constant(graph.constants[second.inputs[1]].reshape(-1))
    bias = writer.constant(bias_values(lowering, second, len(weight)))
    y = lowering.write(writer, node.outputs[0])
    scratch = writer.scratch("float32", plane * lowering.threads + lowering.vector)
    part_table(writer, sparse_weights(weight, graph.constant(first.input(2)), plane), "parts")
    middle = View(source.storage, source.dtype, source.shape, (0, plane, width, 1))
    shape = {**_fields(n, plane // lowering.vector, source, middle), "groups": 1, "parts": 1}
    planar = planar_fields(window, n, len(weight), plane, y.strides[1])
    strip = strip_rows(window, lowering.threads)
    depthwise = define_depthwise(lowering, window, ends[1], strip)
    # Rows of 112 or 56 pixels are a multiple of 7 vectors of 16 in most strips.
    function = lowering.program.define_named(
        "fw_sparse_block",
        f"FW_DEFINE_SPARSE_DEPTHWISE({{name}}, 7, {window.kernel[0]}, {window.strides[0]}, {ends[0].name}, "
        f"{depthwise})",
    )
    writer.line(f"static const fw_sparse shape = {{{initialiser(shape)}}};")
    writer.line(f"static const fw_planar planar = {{{initialiser(planar)}}};")
    pointers = f"{x.var}, {aux[0]}, {w.var}, {bias.var}, {aux[1]}, {y.var}, {scratch.var}"
    writer.line(f"{function}(&shape, parts, &planar, {strip}, {pointers}, tid, threads);")


def strip_rows(window: Window, threads: int) -> int:
    """Return the output rows of a strip: few enough for the first cache, with little to make twice."""
    most = STRIP_INPUTS // window.inputs[1] // window.strides[0]
    return max(1, min(most, -(-window.outputs[0] // threads)))


def define_depthwise(lowering: Lowering, window: Window, epilogue: Epilogue, strip: int = 0) -> str:
    """Define a depthwise kernel that runs on `strip` rows at a time, or all, and return its name."""
    room = registers(lowering.vector) - window.taps - 2
    strip = strip or window.outputs[0]
    rows = max(1, min(strip, 14 if strip % 14 == 0 else 7, room))
    return lowering.program.define_named(
        "fw_planar",
        f"FW_DEFINE_PLANAR_DEPTHWISE({{name}}, {window.kernel[0]}, {window.kernel[1]}, {window.strides[0]}, "
        f"{rows}, {epilogue.name})",
    )


def planar_fields(
    window: Window, images: int, channels: int, x_plane: int, y_plane: int
) -> dict[str, int | str]:
    """Return the fields of `fw_planar`; strides in floats."""
    return {
        "images": images,
        "channels": channels,
        "rows": window.outputs[0],
        "columns": window.outputs[1],
        "in_rows": window.inputs[0],
        "in_columns": window.inputs[1],
        "pad_top": window.before[0],
        "pad_left": window.before[1],
        "taps": window.taps,
        "x_plane": x_plane,
        "y_plane": y_plane,
    }


def bias_values(lowering: Lowering, node: Node, channels: int) -> np.ndarray:
    """Return a convolution's bias, zeros where it has none."""
    value = lowering.graph.constant(node.input(2))
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
