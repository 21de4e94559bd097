"""Softmax and normalisations on the vector kernels of softmax.h: rows of floats that lie contiguously."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.conv_parts import initialiser
from featherweight.compiler.emit_norm import emit_layer_norm
from featherweight.compiler.emit_reduce import emit_softmax
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits, emits_pixel
from featherweight.compiler.pack import pad_channels


def _headers(lowering: Lowering) -> None:
    for name in ("vector.h", "vmath.h", "softmax.h"):
        lowering.program.need_header(name)


def _on_vectors(lowering: Lowering, name: str, size: int) -> bool:
    """Say whether rows of this many elements of a tensor are worth the vector kernel."""
    kind = lowering.graph.types[name]
    return kind.dtype == np.float32 and size >= 4 and kind.size > 0


@emits("Softmax")
def emit_softmax_rows(lowering: Lowering, node: Node) -> None:
    """Rows of the last axis on vectors, other axes in loops."""
    shape = lowering.graph.shape(node.inputs[0])
    axis = node.attrs.get("axis", -1) % max(len(shape), 1)
    if axis != len(shape) - 1 or not _on_vectors(lowering, node.inputs[0], shape[-1]):
        emit_softmax(lowering, node)
        return
    _headers(lowering)
    source = lowering.plain(node.inputs[0])
    writer = lowering.start(node, "vector rows")
    x = writer.pointer(source, restrict=False)
    y = lowering.write(writer, node.outputs[0], restrict=False)
    writer.step.in_place.append((y.view.storage, source.storage))
    fields = {"rows": math.prod(shape[:-1]), "channels": shape[-1], "x_row": shape[-1], "y_row": shape[-1]}
    writer.line(f"static const fw_rows shape = {{{initialiser(fields)}}};")
    writer.line(f"fw_softmax(&shape, {x.var}, {y.var}, tid, threads);")


@emits("LayerNormalization")
def emit_layer_norm_rows(lowering: Lowering, node: Node) -> None:
    """Rows of the last axes on vectors where scale and shift are constants."""
    shape = lowering.graph.shape(node.inputs[0])
    axis = node.attrs.get("axis", -1) % max(len(shape), 1)
    rows, size = math.prod(shape[:axis]), math.prod(shape[axis:])
    scale, shift = lowering.graph.constant(node.inputs[1]), lowering.graph.constant(node.input(2))
    fits = (
        scale is not None
        and scale.size == size
        and (not node.input(2) or (shift is not None and shift.size == size))
    )
    if not fits or any(node.outputs[1:]) or not _on_vectors(lowering, node.inputs[0], size):
        emit_layer_norm(lowering, node)
        return
    _headers(lowering)
    source = lowering.plain(node.inputs[0])
    writer = lowering.start(node, "vector rows")
    x = writer.pointer(source)
    gamma = writer.constant(pad_channels(scale.reshape(-1), lowering.vector))
    offset = np.zeros(size, np.float32) if shift is None else shift.reshape(-1)
    beta = writer.constant(pad_channels(offset, lowering.vector))
    y = lowering.write(writer, node.outputs[0])
    fields = {"rows": rows, "channels": size, "x_row": size, "y_row": size}
    epsilon = x.ctype.literal(node.attrs.get("epsilon", 1e-5))
    writer.line(f"static const fw_rows shape = {{{initialiser(fields)}}};")
    pointers = f"{x.var}, {gamma.var}, {beta.var}, {epsilon}, {y.var}"
    writer.line(f"fw_layer_norm(&shape, {pointers}, tid, threads);")


@emits_pixel("Softmax")
def emit_pixel_softmax(lowering: Lowering, node: Node) -> None:
    """Over the channels of each pixel on vectors, over rows and columns in loops."""
    if node.attrs.get("axis", -1) % 4 != 1:
        emit_softmax(lowering, node)
        return
    _headers(lowering)
    source = lowering.own_pixels(node.inputs[0])
    n, channels, height, width = source.shape
    writer = lowering.start(node, "vector rows")
    x = writer.pointer(source, restrict=False)
    y = lowering.write(writer, node.outputs[0], restrict=False)
    fields = {
        "rows": n * height * width,
        "channels": channels,
        "whole": 1,
        "x_row": source.strides[3],
        "y_row": y.view.strides[3],
    }
    writer.line(f"static const fw_rows shape = {{{initialiser(fields)}}};")
    writer.line(f"fw_softmax(&shape, {x.var}, {y.var}, tid, threads);")


@emits_pixel("InstanceNormalization", "GroupNormalization")
def emit_pixel_group_norm(lowering: Lowering, node: Node) -> None:
    """Statistics over the pixels of groups of channels; one channel each in an instance norm."""
    graph = lowering.graph
    n, channels, height, width = graph.shape(node.inputs[0])
    groups = node.attrs.get("num_groups", channels)
    scale, shift = (graph.constants[name].reshape(-1) for name in node.inputs[1:3])
    if len(scale) != channels:
        # Before opset 21 a group norm has one scale a group.
        scale, shift = (np.repeat(value, channels // groups) for value in (scale, shift))
    source = lowering.own_pixels(node.inputs[0])
    _headers(lowering)
    writer = lowering.start(node, "vector rows")
    x = writer.pointer(source, restrict=False)
    gamma, beta = (writer.constant(pad_channels(value, lowering.vector)) for value in (scale, shift))
    vectors = gamma.view.shape[0]
    work = writer.scratch(np.float32, 2 * vectors * n)
    y = lowering.write(writer, node.outputs[0], restrict=False)
    fields = {
        "rows": n * height * width,
        "channels": channels,
        "whole": int(y.view.lanes_free),
        "x_row": source.strides[3],
        "y_row": y.view.strides[3],
        "rows_of_image": height * width,
    }
    epsilon = x.ctype.literal(node.attrs.get("epsilon", 1e-5))
    writer.line(f"static const fw_rows shape = {{{initialiser(fields)}}};")
    pointers = f"{x.var}, {gamma.var}, {beta.var}, {epsilon}, {work.var}, {y.var}"
    # Scratch is one part a thread and there are no more busy threads than images.
    writer.line(
        f"if (tid < {n}) fw_group_norm(&shape, {groups}, {pointers}, tid, threads < {n} ? threads : {n});"
    )
