"""Normalisations in the row-major layout: statistics in double, then one scaled pass."""

from __future__ import annotations

import math
from collections.abc import Callable

from featherweight.compiler.emit_shape import step_between
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter


def _statistics(writer: StepWriter, size: int, epsilon: float, centred: bool = True) -> None:
    """Declare `mean` and `factor`, one over the deviation, of `size` elements at `in`."""
    writer.line("double mean = 0, square = 0;")
    if centred:
        writer.line(f"for (long k = 0; k < {size}; k++) mean += in[k];")
        writer.line(f"mean /= {size};")
    writer.line(f"for (long k = 0; k < {size}; k++) square += (in[k] - mean) * (in[k] - mean);")
    writer.line(f"const double factor = 1 / sqrt(square / {size} + {epsilon!r});")


@emits("LayerNormalization", "RMSNormalization")
def emit_layer_norm(lowering: Lowering, node: Node) -> None:
    """Over the last axes; the root mean square form subtracts no mean."""
    for name in node.inputs:
        if name:
            lowering.plain(name)
    centred = node.op == "LayerNormalization"
    writer = lowering.start(node)
    x, scale = (lowering.read(writer, name) for name in node.inputs[:2])
    shift = lowering.read(writer, node.inputs[2]) if node.input(2) else None
    outputs = [lowering.write(writer, name) if name else None for name in node.outputs]
    axis = node.attrs.get("axis", -1) % len(x.shape)
    rows, size = math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    for operand in (scale, shift):
        if operand and math.prod(operand.shape) not in (1, size):
            lowering.refuse(node, f"its scale has the shape {list(operand.shape)}")
    kind = x.ctype.name
    with writer.parallel("i", rows):
        writer.line(f"const {kind} *in = {x.var} + i * {size};")
        _statistics(writer, size, node.attrs.get("epsilon", 1e-5), centred)
        weight = f"{scale.var}[{'k' if math.prod(scale.shape) > 1 else '0'}]"
        bias = f" + {shift.var}[{'k' if math.prod(shift.shape) > 1 else '0'}]" if shift else ""
        with writer.loop("k", size):
            writer.line(
                f"{outputs[0].var}[i * {size} + k] = ({kind})((in[k] - mean) * factor) * {weight}{bias};"
            )
        for output, value in zip(outputs[1:], ("mean", "factor"), strict=False):
            if output:
                writer.line(f"{output.var}[i] = ({output.ctype.name}){value};")


def _by_channel(lowering: Lowering, node: Node, groups: int, scale_of: Callable[[Operand, int], str]) -> None:
    """Normalise each of `groups` runs of channels of each image, then scale and shift by channel."""
    for name in node.inputs:
        lowering.plain(name)
    writer = lowering.start(node)
    x, scale, shift = (lowering.read(writer, name) for name in node.inputs[:3])
    y = lowering.write(writer, node.outputs[0])
    batch, channels = x.shape[:2]
    area, each = math.prod(x.shape[2:]), channels // groups
    kind = x.ctype.name
    with writer.parallel("g", batch * groups):
        writer.line(f"const {kind} *in = {x.var} + g * {each * area};")
        _statistics(writer, each * area, node.attrs.get("epsilon", 1e-5))
        with writer.loop("c", each):
            writer.line(f"const double a = factor * {scale_of(scale, each)};")
            writer.line(f"const double b = {scale_of(shift, each)} - mean * a;")
            with writer.loop("k", area):
                place = f"(g * {each} + c) * {area} + k"
                writer.line(f"{y.var}[{place}] = ({kind})(in[c * {area} + k] * a + b);")


@emits("InstanceNormalization")
def emit_instance_norm(lowering: Lowering, node: Node) -> None:
    """Over each channel of each image."""
    channels = lowering.graph.shape(node.inputs[0])[1]
    _by_channel(lowering, node, channels, lambda operand, each: f"{operand.var}[g % {channels}]")


@emits("GroupNormalization")
def emit_group_norm(lowering: Lowering, node: Node) -> None:
    """Over each group of channels of an image; before opset 21 one scale a group, then one a channel."""
    groups = node.attrs["num_groups"]
    by_channel = lowering.graph.shape(node.inputs[1]) == lowering.graph.shape(node.inputs[0])[1:2]

    def scale_of(operand: Operand, each: int) -> str:
        return f"{operand.var}[g % {groups}{f' * {each} + c' if by_channel else ''}]"

    _by_channel(lowering, node, groups, scale_of)


@emits("LpNormalization")
def emit_lp_norm(lowering: Lowering, node: Node) -> None:
    """Divide by the norm along an axis."""
    lowering.plain(node.inputs[0])
    writer, x, y = step_between(lowering, node)
    axis = node.attrs.get("axis", -1) % len(x.shape)
    size, after = x.shape[axis], math.prod(x.shape[axis + 1 :])
    order = node.attrs.get("p", 2)
    with nested(writer, (math.prod(x.shape[:axis]), after), ("i0", "i1")):
        element = f"{x.var}[(i0 * {size} + k) * {after} + i1]"
        term = f"(double){element} * {element}" if order == 2 else f"fabs({element})"
        writer.line("double sum = 0;")
        writer.line(f"for (long k = 0; k < {size}; k++) sum += {term};")
        writer.line(f"const double norm = {'sqrt(sum)' if order == 2 else 'sum'};")
        target = f"{y.var}[(i0 * {size} + k) * {after} + i1]"
        value = f"norm == 0 ? 0 : ({x.ctype.name})({element} / norm)"
        writer.line(f"for (long k = 0; k < {size}; k++) {target} = {value};")


@emits("LRN")
def emit_lrn(lowering: Lowering, node: Node) -> None:
    """Divide by a power of the squares of neighbouring channels."""
    lowering.plain(node.inputs[0])
    writer, x, y = step_between(lowering, node)
    batch, channels = x.shape[:2]
    area, size = math.prod(x.shape[2:]), node.attrs["size"]
    alpha, beta, bias = (node.attrs.get(k, d) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    kind = x.ctype.name
    with nested(writer, (batch * channels, area), ("f", "k")):
        writer.line(f"const long c = f % {channels}, first = f - c;")
        writer.line("double sum = 0;")
        low, high = f"fw_max(0, c - {(size - 1) // 2})", f"fw_min({channels - 1}, c + {size // 2})"
        with writer.block(f"for (long d = {low}; d <= {high}; d++)"):
            writer.line(f"const double v = {x.var}[(first + d) * {area} + k];")
            writer.line("sum += v * v;")
        scale = f"pow({float(bias)!r} + {float(alpha) / size!r} * sum, {float(beta)!r})"
        writer.line(f"{y.var}[f * {area} + k] = ({kind})({x.var}[f * {area} + k] / {scale});")


@emits("MeanVarianceNormalization")
def emit_mvn(lowering: Lowering, node: Node) -> None:
    """Over fixed axes, by default batch and space."""
    writer, x, y = step_between(lowering, node)
    axes = {axis % len(x.shape) for axis in node.attrs.get("axes") or [0, 2, 3]}
    outer = [axis for axis in range(len(x.shape)) if axis not in axes]
    inner = sorted(axes)
    count = math.prod(x.shape[axis] for axis in inner)
    names = {axis: f"i{axis}" for axis in range(len(x.shape))}
    kind = x.ctype.name

    def place(operand: Operand) -> str:
        return " + ".join(f"{names[axis]} * {stride}" for axis, stride in enumerate(operand.strides))

    sizes, variables = [x.shape[axis] for axis in inner], [names[axis] for axis in inner]
    with nested(writer, [x.shape[axis] for axis in outer] or [1], [names[axis] for axis in outer] or ["one"]):
        writer.line("double mean = 0, square = 0;")
        with nested(writer, sizes, variables, parallel=False):
            writer.line(f"mean += {x.var}[{place(x)}];")
        writer.line(f"mean /= {count};")
        with nested(writer, sizes, variables, parallel=False):
            writer.line(f"square += ({x.var}[{place(x)}] - mean) * ({x.var}[{place(x)}] - mean);")
        writer.line(f"const double factor = 1 / (sqrt(square / {count}) + 1e-9);")
        with nested(writer, sizes, variables, parallel=False):
            writer.line(f"{y.var}[{place(y)}] = ({kind})(({x.var}[{place(x)}] - mean) * factor);")
