"""Element-wise operators as expressions of C.

`expression` gives the value of one element from those of the inputs. Types follow ONNX: comparisons give
bool, arithmetic stays in the input's type, functions of integers go through double.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featherweight.compiler.ctype import CType

Attrs = dict[str, Any]
Unary = Callable[[str, CType, Attrs], str]


def _call(base: str) -> Unary:
    def write(x: str, kind: CType, attrs: Attrs) -> str:
        return f"{kind.math.function(base)}({x})"

    return write


def _formula(template: str, **defaults: float) -> Unary:
    """A formula with `x` for the argument, `{f}` for the float suffix and attributes by name."""

    def write(x: str, kind: CType, attrs: Attrs) -> str:
        number = kind.math
        values = {name: number.literal(attrs.get(name, default)) for name, default in defaults.items()}
        suffix = "f" if number.name == "float" else ""
        return template.format(x=x, f=suffix, one=number.literal(1), zero=number.literal(0), **values)

    return write


def _gelu(x: str, kind: CType, attrs: Attrs) -> str:
    lit = kind.math.literal
    half = f"{lit(0.5)} * {x}"
    if attrs.get("approximate", "none") == "tanh":
        inner = f"{lit(math.sqrt(2 / math.pi))} * ({x} + {lit(0.044715)} * {x} * {x} * {x})"
        return f"({half} * ({lit(1)} + {kind.function('tanh')}({inner})))"
    return f"({half} * ({lit(1)} + {kind.function('erf')}({x} * {lit(math.sqrt(0.5))})))"


def _abs(x: str, kind: CType, attrs: Attrs) -> str:
    if kind.is_float:
        return f"{kind.function('fabs')}({x})"
    return x if kind.dtype.kind in "ub" else f"({x} < 0 ? -{x} : {x})"


def _is_inf(x: str, kind: CType, attrs: Attrs) -> str:
    tests = []
    if attrs.get("detect_positive", 1):
        tests.append(f"{x} == INFINITY")
    if attrs.get("detect_negative", 1):
        tests.append(f"{x} == -INFINITY")
    return f"({' || '.join(tests)})" if tests else "0"


_SOFTPLUS = "({x} > 20 ? {x} : log1p{f}(exp{f}({x})))"
UNARY: dict[str, Unary] = {
    **{
        name: _call(name.lower())
        for name in [
            "Acosh",
            "Asinh",
            "Atanh",
            "Cosh",
            "Sinh",
            "Tanh",
            "Acos",
            "Asin",
            "Atan",
            "Cos",
            "Sin",
            "Tan",
            "Exp",
            "Log",
            "Sqrt",
            "Erf",
            "Ceil",
            "Floor",
        ]
    },
    "Round": _call("rint"),
    "Abs": _abs,
    "Neg": _formula("(-{x})"),
    "Not": _formula("(!{x})"),
    "BitwiseNot": _formula("(~{x})"),
    "Identity": _formula("{x}"),
    "Reciprocal": _formula("({one} / {x})"),
    "Relu": _formula("({x} < 0 ? 0 : {x})"),
    "Sigmoid": _formula("({one} / ({one} + exp{f}(-{x})))"),
    "Swish": _formula("({x} / ({one} + exp{f}(-{alpha} * {x})))", alpha=1.0),
    "LeakyRelu": _formula("({x} < 0 ? {alpha} * {x} : {x})", alpha=0.01),
    "Elu": _formula("({x} < 0 ? {alpha} * expm1{f}({x}) : {x})", alpha=1.0),
    "Celu": _formula("({x} < 0 ? {alpha} * expm1{f}({x} / {alpha}) : {x})", alpha=1.0),
    "Selu": _formula(
        "({gamma} * ({x} <= 0 ? {alpha} * expm1{f}({x}) : {x}))",
        alpha=1.67326319217681884765625,
        gamma=1.05070102214813232421875,
    ),
    "ThresholdedRelu": _formula("({x} > {alpha} ? {x} : {zero})", alpha=1.0),
    "HardSigmoid": _formula("fmin{f}({one}, fmax{f}({zero}, {alpha} * {x} + {beta}))", alpha=0.2, beta=0.5),
    "HardSwish": _formula("({x} * fmin{f}({one}, fmax{f}({zero}, {x} / 6 + {half})))", half=0.5),
    "Softplus": _formula(_SOFTPLUS),
    "Mish": _formula(f"({{x}} * tanh{{f}}({_SOFTPLUS}))"),
    "Softsign": _formula("({x} / ({one} + fabs{f}({x})))"),
    "Shrink": _formula(
        "({x} < -{lambd} ? {x} + {bias} : {x} > {lambd} ? {x} - {bias} : {zero})", lambd=0.5, bias=0.0
    ),
    "Sign": _formula("(({x} > 0) - ({x} < 0))"),
    "IsNaN": _formula("({x} != {x})"),
    "IsInf": _is_inf,
    "Gelu": _gelu,
}
BINARY = {
    "Add": "({a} + {b})",
    "Sub": "({a} - {b})",
    "Mul": "({a} * {b})",
    "And": "({a} && {b})",
    "Or": "({a} || {b})",
    "Xor": "(!{a} != !{b})",
    "Equal": "({a} == {b})",
    "Greater": "({a} > {b})",
    "GreaterOrEqual": "({a} >= {b})",
    "Less": "({a} < {b})",
    "LessOrEqual": "({a} <= {b})",
    "BitwiseAnd": "({a} & {b})",
    "BitwiseOr": "({a} | {b})",
    "BitwiseXor": "({a} ^ {b})",
    "PRelu": "({a} < 0 ? {a} * {b} : {a})",
    # A NaN on either side is the answer, as in numpy.
    "Max": "({a} > {b} || {a} != {a} ? {a} : {b})",
    "Min": "({a} < {b} || {a} != {a} ? {a} : {b})",
    "Sum": "({a} + {b})",
}
VARIADIC = ("Max", "Min", "Sum", "Mean")
OTHER = ("Div", "Mod", "Pow", "BitShift", "Where", "Cast", "Clip", "Mean")
ELEMENTWISE = frozenset([*UNARY, *BINARY, *OTHER])


def expression(op: str, args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    """Return the C expression of one element.

    Args:
        op: an operator of `ELEMENTWISE`.
        args: expressions of the inputs' elements, each free of side effects; an absent one is empty.
        kinds: the inputs' types.
        out: the output's type.
        attrs: the node's attributes.
    """
    if op in UNARY:
        text = UNARY[op](args[0], kinds[0], attrs)
    elif op in VARIADIC:
        text = _variadic(op, args, kinds[0])
    elif op in BINARY:
        text = BINARY[op].format(a=args[0], b=args[1])
    else:
        text = _OTHERS[op](args, kinds, out, attrs)
    return text if out == kinds[0] and out.is_float else f"({out.name})({text})"


def _variadic(op: str, args: Sequence[str], kind: CType) -> str:
    pattern = BINARY["Sum" if op == "Mean" else op]
    text = args[0]
    for arg in args[1:]:
        text = pattern.format(a=text, b=arg)
    return f"({text} / {kind.literal(len(args))})" if op == "Mean" else text


def _div(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    if out.is_float:
        return f"({args[0]} / {args[1]})"
    return f"{'fw_udiv' if out.dtype.kind == 'u' else 'fw_div'}({args[0]}, {args[1]})"


def _mod(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    if out.is_float:
        return f"{'fmod' if attrs.get('fmod', 0) else 'fw_fmodd'}({args[0]}, {args[1]})"
    name = "fw_umod" if out.dtype.kind == "u" else "fw_fmod" if attrs.get("fmod", 0) else "fw_mod"
    return f"{name}({args[0]}, {args[1]})"


def _pow(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    kind = kinds[0].math
    return f"{kind.function('pow')}(({kind.name}){args[0]}, ({kind.name}){args[1]})"


def _shift(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    """Beyond the type's width only the sign is left, and of a shift to the left nothing."""
    a, b = args
    bits, signed = out.dtype.itemsize * 8, out.dtype.kind == "i"
    if attrs["direction"] == "LEFT":
        inside, beyond = f"(uint64_t){a} << {b}", "0"
    else:
        inside, beyond = f"{a} >> {b}", f"{a} < 0 ? -1 : 0" if signed else "0"
    outside = f"{b} < 0 || {b} >= {bits}" if signed else f"{b} >= {bits}"
    return f"({outside} ? ({out.name})({beyond}) : ({out.name})({inside}))"


def _cast(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    if out.is_bool:
        return f"({args[0]} != 0)"
    if kinds[0].is_float and not out.is_float:
        # Through the widest integer: a direct cast of a negative value to an unsigned type is undefined.
        return f"(int64_t){args[0]}"
    return args[0]


def _where(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    return f"({args[0]} ? {args[1]} : {args[2]})"


def _clip(args: Sequence[str], kinds: Sequence[CType], out: CType, attrs: Attrs) -> str:
    text = args[0]
    if len(args) > 1 and args[1]:
        text = f"({text} < {args[1]} ? {args[1]} : {text})"
    if len(args) > 2 and args[2]:
        text = f"({text} > {args[2]} ? {args[2]} : {text})"
    return text


_OTHERS = {
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "BitShift": _shift,
    "Where": _where,
    "Cast": _cast,
    "Clip": _clip,
}


def saturate(text: str, kind: CType, out: CType) -> str:
    """Return `text`, a float, rounded half to even and clipped to the range of an integer type."""
    limits = np.iinfo(out.dtype)
    number = kind.math
    low, high = number.literal(limits.min), number.literal(limits.max)
    return f"({out.name}){number.function('fw_saturate')}({text}, {low}, {high})"
