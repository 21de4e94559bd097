"""What a call of a float32 convolution kernel needs: function, struct, packed weights and epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featherweight.compiler.emit_vector import literals
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering
from featherweight.compiler.pack import (
    conv_groups,
    conv_weights,
    depthwise_spans,
    depthwise_weights,
    pad_channels,
)
from featherweight.compiler.program import Operand, Program, StepWriter, View
from featherweight.compiler.tiles import CACHE_BYTES, Tile
from featherweight.compiler.vector_expressions import body_lines
from featherweight.compiler.windows import Window


class Epilogue:
    """What follows a sum: the name of a macro-like function, the residual and the constants a channel.

    Args:
        lowering: the state of lowering.
        node: a convolution or `Linear`, with or without a fused body.
        planar: vectors run over pixels, so that a constant a channel is one number.
    """

    def __init__(self, lowering: Lowering, node: Node, planar: bool = False) -> None:
        self.lowering, self.node, self.planar = lowering, node, planar
        graph = lowering.graph
        extra = node.inputs[3:]
        self.residual = next((name for name in extra if graph.constant(name) is None), "")
        self.channel_constants = [
            name for name in extra if name != self.residual and graph.constants[name].size > 1
        ]
        self.name = "FW_EPILOGUE_NONE"

    def define(self, vectors: int) -> None:
        """Emit the function; constants lie in runs of `vectors` vectors, or channels if planar."""
        body = self.node.attrs.get("body")
        if not body:
            return
        values = literals(self.lowering, self.node.inputs[3:], vector=True)
        lines = []
        for index, name in enumerate(self.channel_constants):
            place = (
                f"vf_set(aux[{index * vectors}])" if self.planar else f"vf_load(aux + {index * vectors} * VL)"
            )
            lines.append(f"const vf c{index} = {place};")
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
        values = [
            pad_channels(self.lowering.graph.constants[name].reshape(-1), lanes)
            for name in self.channel_constants
        ]
        return writer.constant(np.concatenate(values)).var


def headers(lowering: Lowering, *names: str) -> None:
    for name in ("vector.h", *names):
        lowering.program.need_header(name)


def bias_of(lowering: Lowering, writer: StepWriter, node: Node, channels: int) -> Operand:
    value = lowering.graph.constant(node.input(2))
    value = np.zeros(channels, np.float32) if value is None else value
    return writer.constant(pad_channels(value.reshape(-1), lowering.vector))


def lanes_of(view: View, vector: int) -> int:
    """Return how many lanes of the last vector may be stored."""
    return (view.padded_channels(vector) - 1) % vector + 1


@dataclass(frozen=True)
class Parts:
    """A kernel's call: `function` with the struct `fields`, and the C variables of its constants.

    Attributes:
        function: its name; of a depthwise layer the number of its spans.
        fields: of the struct.
        weights: packed weights.
        bias: of whole vectors.
        aux: constants a channel, NULL without any.
        tile: what the report calls the tile.
    """

    function: str
    fields: dict[str, int | str]
    weights: str
    bias: str
    aux: str
    tile: str

    @property
    def constants(self) -> str:
        """The constants in the order of the kernels' arguments."""
        return f"{self.weights}, {self.bias}, {self.aux}"


def initialiser(fields: dict[str, int | str]) -> str:
    """Return a designated initialiser of C99."""
    return ", ".join(f".{name} = {value}" for name, value in fields.items())


def define_conv(
    program: Program, tile: Tile, epilogue: str = "FW_EPILOGUE_NONE", residual: bool = False
) -> str:
    """Define the kernel of a tile with its epilogue, once, and return its name."""
    even = tile.last == tile.vectors
    sizes = f"{tile.rows}, {tile.vectors}" if even else f"{tile.rows}, {tile.vectors}, {tile.last}"
    return program.define_named(
        "fw_conv", f"FW_DEFINE_{'EVEN_' * even}CONV({{name}}, {sizes}, {epilogue}, {int(residual)})"
    )


def product_parts(
    lowering: Lowering,
    writer: StepWriter,
    node: Node,
    epilogue: Epilogue,
    fields: dict[str, int],
    weight: np.ndarray,
    depth: int,
    groups: int = 1,
) -> Parts:
    """Choose the tile and pack the weights of a product (conv.h).

    Args:
        lowering: the state of lowering.
        writer: the step's writer.
        node: the convolution or `Linear`.
        epilogue: what follows the sums.
        fields: rows, columns, taps, strides and lanes of the struct.
        weight: (O, I / groups, height, width).
        depth: input channels of a tap.
        groups: groups of the convolution.
    """
    headers(lowering, "conv.h")
    vl, filters = lowering.vector, weight.shape[0]
    vectors = -(-filters // vl)
    epilogue.define(vectors)
    tile = lowering.choose_tile(writer, fields, depth, vectors)
    grouping = conv_groups(filters, weight.shape[1] * groups, groups, vl, tile.vectors)
    first = "NULL"
    if grouping.first is not None:
        first, depth = "first", grouping.depth
        writer.line(f"static const int first[] = {{{', '.join(map(str, grouping.first))}}};")
    function = define_conv(lowering.program, tile, epilogue.name, bool(epilogue.residual))
    blocks = work_units(fields, tile, vectors, lowering.threads)
    return Parts(
        function,
        {**fields, "depth": depth, "vectors": vectors, **blocks, "first": first},
        writer.constant(conv_weights(weight, vl, tile.vectors, groups)).var,
        bias_of(lowering, writer, node, filters).var,
        epilogue.aux(writer, vectors, vl),
        f"{tile.rows}x{tile.vectors}",
    )


def work_units(fields: dict[str, int], tile: Tile, vectors: int, threads: int) -> dict[str, int]:
    """Return the unit of work: activations that fit the cache, in equal shares for the threads.

    Where there are too few pixels for that, the groups of weights are shared instead.
    """
    groups = -(-vectors // tile.vectors)
    columns, rows = fields["columns"], fields.get("images", 1) * fields["rows"]
    passes = -(-columns // tile.rows)
    units = -(-columns * max(fields["x_column"] * 4, 1) // CACHE_BYTES)
    if rows == 1 and threads > 1:
        units = -(-units // threads) * threads
    if units > passes or (rows == 1 and passes < 4 * threads):
        share = 1 if threads == 1 else -(-groups // (-(-groups // threads) * threads))
        return {"block_rows": 1, "block_columns": columns, "block_groups": share}
    if units > 1:
        width = -(-passes // units) * tile.rows
        return {"block_rows": 1, "block_columns": width, "block_groups": groups}
    most = max(CACHE_BYTES // max(fields["x_column"] * 4 * columns, 1), 1)
    block = max(1, min(most, -(-rows // threads), fields["rows"]))
    return {"block_rows": block, "block_columns": columns, "block_groups": groups}


def depthwise_parts(
    lowering: Lowering,
    writer: StepWriter,
    node: Node,
    epilogue: Epilogue,
    window: Window,
    most: int,
    fields: dict[str, int],
) -> Parts:
    """Cut the rows into tiles and pack the weights of a depthwise convolution (depthwise.h).

    Args:
        lowering: the state of lowering.
        writer: the step's writer.
        node: the convolution.
        epilogue: what follows the sums.
        window: its geometry.
        most: the most outputs of a tile.
        fields: images, lanes and strides of the struct.
    """
    headers(lowering, "conv.h", "depthwise.h")
    weight = lowering.graph.constants[node.inputs[1]]
    vl, channels = lowering.vector, len(weight)
    vectors = -(-channels // vl)
    epilogue.define(vectors)
    width, stride, dilation = window.kernel[1], window.strides[1], window.dilations[1]
    spans = depthwise_spans(
        window.outputs[1], window.inputs[1], width, stride, dilation, window.before[1], most
    )
    rows = []
    for span in spans:
        arguments = f"{width}, {stride}, {dilation}, {span.outputs}, {span.low}, {span.high}, {epilogue.name}"
        name = lowering.program.define_named(
            "fw_dw", f"FW_DEFINE_DEPTHWISE_TILE({{name}}, {arguments}, {int(bool(epilogue.residual))})"
        )
        rows.append(
            f"{{{name}, {span.count}, {span.column}, {span.columns}, {span.in_column}, {span.in_columns}}}"
        )
    geometry = {
        "rows": window.outputs[0],
        "in_rows": window.inputs[0],
        "tap_rows": window.kernel[0],
        "tap_columns": width,
        "stride_rows": window.strides[0],
        "dilation_rows": window.dilations[0],
        "pad_top": window.before[0],
        "vectors": vectors,
    }
    writer.line(f"static const fw_depthwise_span spans[] = {{{', '.join(rows)}}};")
    return Parts(
        str(len(spans)),
        {**geometry, **fields},
        writer.constant(depthwise_weights(weight, vl)).var,
        bias_of(lowering, writer, node, channels).var,
        epilogue.aux(writer, vectors, vl),
        str(spans[len(spans) // 2].outputs),
    )
