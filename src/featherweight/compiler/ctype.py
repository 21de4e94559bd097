"""Names, literals and functions of C for each numpy data type that generated code can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_NAMES = {
    "float32": "float",
    "float64": "double",
    "bool": "uint8_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
}


@dataclass(frozen=True)
class CType:
    """How one data type is written in C."""

    dtype: np.dtype

    @property
    def name(self) -> str:
        """The type's name, `float` or `int32_t` say."""
        return _NAMES[self.dtype.name]

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point type."""
        return self.dtype.kind == "f"

    @property
    def is_bool(self) -> bool:
        """Whether it holds 0 or 1."""
        return self.dtype.kind == "b"

    @property
    def math(self) -> CType:
        """The type that functions such as `exp` compute in."""
        return self if self.is_float else CType(np.dtype(np.float64))

    def function(self, base: str) -> str:
        """Return the name of a function of math.h for this type, `expf` for `exp` of float."""
        return base + ("f" if self.dtype == np.float32 else "")

    def literal(self, value: Any) -> str:
        """Return a value as a C expression that reads back exactly."""
        if self.is_float:
            value = float(self.dtype.type(value))
            if math.isnan(value):
                return "NAN"
            if math.isinf(value):
                return "INFINITY" if value > 0 else "(-INFINITY)"
            text = f"{value:.9g}" if self.dtype == np.float32 else repr(value)
            text = text if any(mark in text for mark in ".en") else text + ".0"
            text += "f" if self.dtype == np.float32 else ""
            return f"({text})" if value < 0 or text.startswith("-") else text
        value = int(value)
        if self.dtype == np.int64:
            return "INT64_MIN" if value == -(2**63) else f"INT64_C({value})"
        if self.dtype == np.uint64:
            return f"UINT64_C({value})"
        if self.dtype == np.int32 and value == -(2**31):
            return "INT32_MIN"
        return f"({value})" if value < 0 else f"{value}" + ("u" if self.dtype == np.uint32 else "")

    @property
    def lowest(self) -> str:
        """The smallest value, minus infinity for floats."""
        if self.is_float:
            return self.literal(-np.inf)
        return "0" if self.is_bool else self.literal(np.iinfo(self.dtype).min)

    @property
    def highest(self) -> str:
        """The largest value, infinity for floats."""
        if self.is_float:
            return self.literal(np.inf)
        return "1" if self.is_bool else self.literal(np.iinfo(self.dtype).max)


def is_supported(dtype: np.dtype) -> bool:
    """Say whether generated code can hold this data type."""
    return dtype.name in _NAMES
