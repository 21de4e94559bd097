"""Element-wise operators as expressions over vectors of float32, in the words of vector.h and vmath.h."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featherweight.compiler.ctype import CType
from featherweight.compiler.graph import Graph, Node

FLOAT = CType(np.dtype(np.float32))
Attrs = dict[str, Any]


def _set(value: float) -> str:
    return f"vf_set({FLOAT.literal(value)})"


def _template(text: str, **defaults: float) -> Callable[[Sequence[str], Attrs], str]:
    def write(args: Sequence[str], attrs: Attrs) -> str:
        values = {name: _set(attrs.get(name, default)) for name, default in defaults.items()}
        named = dict(zip("xyz", args, strict=False))
        return text.format(one=_set(1.0), zero="vf_zero()", **named, **values)

    return write


def _gelu(args: Sequence[str], attrs: Attrs) -> str:
    name = "vf_gelu_tanh" if attrs.get("approximate", "none") == "tanh" else "vf_gelu"
    return f"{name}({args[0]})"


def _chain(function: str) -> Callable[[Sequence[str], Attrs], str]:
    def write(args: Sequence[str], attrs: Attrs) -> str:
        text = args[0]
        for arg in args[1:]:
            text = f"{function}({text}, {arg})" if function else f"({text} + {arg})"
        return text

    return write


def _clip(args: Sequence[str], attrs: Attrs) -> str:
    text = args[0]
    if len(args) > 1 and args[1]:
        text = f"vf_max({text}, {args[1]})"
    if len(args) > 2 and args[2]:
        text = f"vf_min({text}, {args[2]})"
    return text


VECTOR: dict[str, Callable[[Sequence[str], Attrs], str]] = {
    "Identity": _template("{x}"),
    "Add": _template("({x} + {y})"),
    "Sub": _template("({x} - {y})"),
    "Mul": _template("({x} * {y})"),
    "Div": _template("({x} / {y})"),
    "Neg": _template("({zero} - {x})"),
    "Abs": _template("vf_abs({x})"),
    "Sqrt": _template("vf_sqrt({x})"),
    "Reciprocal": _template("({one} / {x})"),
    "Floor": _template("vf_floor({x})"),
    "Ceil": _template("vf_ceil({x})"),
    "Round": _template("vf_round({x})"),
    "Relu": _template("vf_max({x}, {zero})"),
    "LeakyRelu": _template("vf_select(vf_gt({zero}, {x}), {x} * {alpha}, {x})", alpha=0.01),
    "PRelu": _template("vf_select(vf_gt({zero}, {x}), {x} * {y}, {x})"),
    "HardSigmoid": _template("vf_min(vf_max({alpha} * {x} + {beta}, {zero}), {one})", alpha=0.2, beta=0.5),
    "HardSwish": _template(
        "({x} * vf_min(vf_max({x} * {sixth} + {half}, {zero}), {one}))", sixth=1 / 6, half=0.5
    ),
    "Exp": _template("vf_exp({x})"),
    "Log": _template("vf_log({x})"),
    "Tanh": _template("vf_tanh({x})"),
    "Erf": _template("vf_erf({x})"),
    "Sigmoid": _template("vf_sigmoid({x})"),
    "Swish": _template("({x} * vf_sigmoid({alpha} * {x}))", alpha=1.0),
    "Elu": _template("vf_select(vf_gt({zero}, {x}), {alpha} * vf_expm1({x}), {x})", alpha=1.0),
    "Celu": _template("vf_select(vf_gt({zero}, {x}), {alpha} * vf_expm1({x} / {alpha}), {x})", alpha=1.0),
    "Softplus": _template("vf_softplus({x})"),
    "Mish": _template("vf_mish({x})"),
    "Softsign": _template("vf_softsign({x})"),
    "Gelu": _gelu,
    "Max": _chain("vf_max"),
    "Min": _chain("vf_min"),
    "Sum": _chain(""),
    "Clip": _clip,
}


def is_vector(graph: Graph, body: Sequence[Node]) -> bool:
    """Say whether a whole body can run on vectors: every operator has a form and every tensor is float32."""
    return all(_is_vector_node(graph, node) for node in body)


def _is_vector_node(graph: Graph, node: Node) -> bool:
    if any(graph.dtype(name) != np.float32 for name in [*node.inputs, *node.outputs] if name):
        return False
    return node.op in VECTOR or (node.op == "Pow" and _power(graph, node) is not None)


def _power(graph: Graph, node: Node) -> float | None:
    exponent = graph.constant(node.inputs[1])
    if exponent is None or exponent.size != 1 or float(exponent.reshape(-1)[0]) not in (0.5, 1.0, 2.0, 3.0):
        return None
    return float(exponent.reshape(-1)[0])


def vector_expression(graph: Graph, node: Node, args: Sequence[str]) -> str:
    """Return the expression of a node over vectors; every argument is a variable."""
    if node.op == "Pow":
        x, power = args[0], _power(graph, node)
        return f"vf_sqrt({x})" if power == 0.5 else "(" + " * ".join([x] * int(power or 1)) + ")"
    if node.op == "Div":
        factor = _reciprocal(graph, node)
        return f"({args[0]} / {args[1]})" if factor is None else f"({args[0]} * {_set(factor)})"
    return VECTOR[node.op](args, node.attrs)


def _reciprocal(graph: Graph, node: Node) -> float | None:
    """Return what a division by one constant multiplies by: a vector divides in the time of 32 products."""
    divisor = graph.constant(node.inputs[1])
    if divisor is None or divisor.size != 1:
        return None
    value = abs(float(divisor.reshape(-1)[0]))
    # Beyond these the reciprocal is not a normal number.
    return 1.0 / float(divisor.reshape(-1)[0]) if 2.0**-126 <= value <= 2.0**126 else None


def body_lines(graph: Graph, body: Sequence[Node], values: dict[str, str]) -> list[str]:
    """Return one line of C for each node of a body; `values` maps tensors to variables and grows."""
    lines = []
    for node in body:
        args = [values[name] if name else "" for name in node.inputs]
        var = f"v{len(values)}"
        lines.append(f"const vf {var} = {vector_expression(graph, node, args)};")
        values[node.outputs[0]] = var
    return lines
