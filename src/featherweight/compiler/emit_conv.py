"""Convolutions in the row-major layout: correct for any rank, group, stride, dilation and padding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from featherweight.compiler.ctype import CType
from featherweight.compiler.expressions import saturate
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter, row_major
from featherweight.compiler.windows import Window, conv_window, transposed_window


def _spatial(lowering: Lowering, node: Node, x: str, w: str) -> Window:
    shape = lowering.graph.shape(x)
    weight = lowering.graph.shape(w)
    if len(shape) < 3 or len(weight) != len(shape):
        lowering.refuse(node, f"the input has {len(shape)} axes and the weight {len(weight)}")
    outputs = lowering.graph.shape(node.outputs[0])[2:]
    return conv_window(node.attrs, weight[2:], shape[2:], outputs)


@emits("Conv")
def emit_conv(lowering: Lowering, node: Node) -> None:
    """One output row at a time: a tap adds a scaled, shifted input row to it."""
    window = _spatial(lowering, node, node.inputs[0], node.inputs[1])
    for name in node.inputs[:2]:
        lowering.plain(name)
    batch, channels = lowering.graph.shape(node.inputs[0])[:2]
    filters, depth = lowering.graph.shape(node.inputs[1])[:2]
    macs = batch * filters * depth * window.taps * math.prod(window.outputs)
    writer = lowering.start(node, "plain convolution", macs)
    x, w = (lowering.read(writer, name) for name in node.inputs[:2])
    bias = lowering.read(writer, node.inputs[2]) if node.input(2) else None
    y = lowering.write(writer, node.outputs[0])
    group_filters = filters // node.attrs.get("group", 1)
    rows, width = math.prod(window.outputs[:-1]), window.outputs[-1]
    with writer.parallel("f", batch * filters):
        writer.line(f"const long n = f / {filters}, o = f % {filters};")
        group = f"(n * {channels} + o / {group_filters} * {depth}) * {math.prod(window.inputs)}"
        writer.line(f"const {x.ctype.name} *xg = {x.var} + {group};")
        writer.line(f"const {w.ctype.name} *wo = {w.var} + o * {depth * window.taps};")
        with writer.loop("r", rows):
            writer.line(f"{y.ctype.name} *row = {y.var} + (f * {rows} + r) * {width};")
            unravel(writer, "r", window.outputs[:-1], "o")
            start = f"{bias.var}[o]" if bias else "0"
            writer.line(f"for (long q = 0; q < {width}; q++) row[q] = {start};")
            with writer.loop("c", depth):
                _taps(writer, window, w.ctype)


def unravel(writer: StepWriter, flat: str, sizes: Sequence[int], prefix: str) -> None:
    """Declare one variable an axis from a flat index, `o0`, `o1` and so on."""
    strides = row_major(sizes)
    for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        writer.line(f"const long {prefix}{axis} = {flat} / {stride} % {size};")


@contextlib.contextmanager
def tap_loops(
    writer: StepWriter, window: Window, axes: int, source: str, limits: Sequence[int]
) -> Iterator[None]:
    """Open a loop over the kernel along every axis, `k0`, `k1` and so on.

    Along the first `axes` axes, `p0`, `p1` and so on become the position that the tap touches for the
    position `source`0, …; taps that fall outside `limits` are skipped.
    """
    with contextlib.ExitStack() as stack:
        for axis, size in enumerate(window.kernel):
            stack.enter_context(writer.loop(f"k{axis}", size))
            if axis < axes:
                tap = f"k{axis} * {window.dilations[axis]} - {window.before[axis]}"
                writer.line(f"const long p{axis} = {source}{axis} * {window.strides[axis]} + {tap};")
                writer.line(f"if (p{axis} < 0 || p{axis} >= {limits[axis]}) continue;")
        yield


def _taps(writer: StepWriter, window: Window, kind: CType) -> None:
    """Add every tap of channel `c` to the output row."""
    inner, step = len(window.kernel) - 1, window.strides[-1]
    places = [f"p{axis} * {stride}" for axis, stride in enumerate(row_major(window.inputs)[:-1])]
    base = " + ".join([f"c * {math.prod(window.inputs)}", *places])
    with tap_loops(writer, window, inner, "o", window.inputs):
        writer.line(f"const {kind.name} weight = wo[c * {window.taps} + {_tap(window)}];")
        writer.line(f"const long shift = k{inner} * {window.dilations[-1]} - {window.before[-1]};")
        writer.line(f"const long last = fw_last(shift, {step}, {window.inputs[-1]}, {window.outputs[-1]});")
        writer.line(f"const {kind.name} *in = xg + {base};")
        writer.line(f"for (long q = fw_first(shift, {step}); q < last; q++)")
        writer.line(f"    row[q] += weight * in[q * {step} + shift];")


def _tap(window: Window) -> str:
    """Return the expression of a tap's place in the kernel."""
    return index_of(row_major(window.kernel), [f"k{axis}" for axis in range(len(window.kernel))])


@emits("ConvTranspose")
def emit_conv_transpose(lowering: Lowering, node: Node) -> None:
    """Scatter each input row, scaled by each tap, into the output channel."""
    shape, weight = (lowering.graph.shape(name) for name in node.inputs[:2])
    outputs = lowering.graph.shape(node.outputs[0])[2:]
    window = transposed_window(node.attrs, weight[2:], shape[2:], outputs)
    for name in node.inputs[:2]:
        lowering.plain(name)
    groups = node.attrs.get("group", 1)
    batch, channels = shape[:2]
    depth, per_group = channels // groups, weight[1]
    filters = per_group * groups
    macs = batch * channels * per_group * window.taps * math.prod(window.inputs)
    writer = lowering.start(node, "plain transposed convolution", macs)
    x, w = (lowering.read(writer, name) for name in node.inputs[:2])
    bias = lowering.read(writer, node.inputs[2]) if node.input(2) else None
    y = lowering.write(writer, node.outputs[0])
    area, rows, width = math.prod(window.outputs), math.prod(window.inputs[:-1]), window.inputs[-1]
    with writer.parallel("f", batch * filters):
        writer.line(f"const long n = f / {filters}, o = f % {filters}, g = o / {per_group};")
        writer.line(f"{y.ctype.name} *out = {y.var} + f * {area};")
        writer.line(f"for (long q = 0; q < {area}; q++) out[q] = {f'{bias.var}[o]' if bias else '0'};")
        with writer.loop("c", depth), writer.loop("r", rows):
            writer.line(f"const long channel = g * {depth} + c;")
            writer.line(
                f"const {x.ctype.name} *in = {x.var} + ((n * {channels} + channel) * {rows} + r) * {width};"
            )
            unravel(writer, "r", window.inputs[:-1], "i")
            _scatter(writer, window, w, per_group)


def _scatter(writer: StepWriter, window: Window, w: Operand, per_group: int) -> None:
    """Add the input row `in` times every tap to the output channel `out`."""
    inner, step = len(window.kernel) - 1, window.strides[-1]
    places = [f"p{axis} * {stride}" for axis, stride in enumerate(row_major(window.outputs)[:-1])]
    with tap_loops(writer, window, inner, "i", window.outputs):
        place = f"(channel * {per_group} + o % {per_group}) * {window.taps} + {_tap(window)}"
        writer.line(f"const {w.ctype.name} weight = {w.var}[{place}];")
        writer.line(f"const long shift = k{inner} * {window.dilations[-1]} - {window.before[-1]};")
        writer.line(f"const long last = fw_last(shift, {step}, {window.outputs[-1]}, {window.inputs[-1]});")
        target = " + ".join([*places, f"q * {step} + shift"])
        writer.line(f"for (long q = fw_first(shift, {step}); q < last; q++) out[{target}] += weight * in[q];")


@emits("ConvInteger", "QLinearConv")
def emit_integer_conv(lowering: Lowering, node: Node) -> None:
    """Products of zero-point corrected integers in 32 bits; QLinearConv scales and saturates the sum."""
    linear = node.op == "QLinearConv"
    x_name, w_name = (node.inputs[0], node.inputs[3]) if linear else (node.inputs[0], node.inputs[1])
    window = _spatial(lowering, node, x_name, w_name)
    for name in (x_name, w_name):
        lowering.plain(name)
    batch, channels = lowering.graph.shape(x_name)[:2]
    filters, depth = lowering.graph.shape(w_name)[:2]
    area = math.prod(window.outputs)
    writer = lowering.start(node, "plain integer convolution", batch * filters * depth * window.taps * area)
    x, w = lowering.read(writer, x_name), lowering.read(writer, w_name)
    zero_names = (node.input(2), node.input(5)) if linear else (node.input(2), node.input(3))
    zeros = [_per_filter(lowering, writer, name) for name in zero_names]
    extras = [_per_filter(lowering, writer, node.input(index)) for index in (1, 4, 6, 7, 8)] if linear else []
    y = lowering.write(writer, node.outputs[0])
    group_filters = filters // node.attrs.get("group", 1)
    with writer.parallel("f", batch * filters):
        writer.line(f"const long n = f / {filters}, o = f % {filters};")
        group = f"(n * {channels} + o / {group_filters} * {depth}) * {math.prod(window.inputs)}"
        writer.line(f"const {x.ctype.name} *xg = {x.var} + {group};")
        writer.line(f"const {w.ctype.name} *wo = {w.var} + o * {depth * window.taps};")
        with writer.loop("r", area):
            unravel(writer, "r", window.outputs, "o")
            writer.line(f"int32_t sum = {extras[4] if linear and node.input(8) else '0'};")
            _integer_taps(writer, window, depth, zeros[0], zeros[1])
            value = "sum"
            if linear:
                scaled = f"rintf((float)sum * ({extras[0]} * {extras[1]} / {extras[2]})) + {extras[3]}"
                value = saturate(scaled, CType(np.dtype(np.float32)), y.ctype)
            writer.line(f"{y.var}[f * {area} + r] = {value};")


def _per_filter(lowering: Lowering, writer: StepWriter, name: str) -> str:
    """Return the expression of a scalar, or of one value a filter; zero where it is absent."""
    if not name:
        return "0"
    operand = lowering.read(writer, name)
    return f"{operand.var}[{'o' if math.prod(operand.shape) > 1 else '0'}]"


def _integer_taps(writer: StepWriter, window: Window, depth: int, x_zero: str, w_zero: str) -> None:
    rank = len(window.kernel)
    place = index_of(row_major(window.inputs), [f"p{axis}" for axis in range(rank)])
    with tap_loops(writer, window, rank, "o", window.inputs), writer.loop("c", depth):
        writer.line(
            f"sum += ((int32_t)xg[c * {math.prod(window.inputs)} + {place}] - {x_zero}) * "
            f"((int32_t)wo[c * {window.taps} + {_tap(window)}] - {w_zero});"
        )
