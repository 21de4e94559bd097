"""ONNX in, one C file out: `compile_onnx` makes a self-contained C source and a library from an ONNX file.

The way of a file: `reader` (checks, shapes, constants) to a `graph`; `passes` rewrite it; `lower` turns nodes
into steps of C through the `emit_*` modules; `memory` places every tensor in one arena; `source` joins all to
`model.c`; `build` calls the C compiler; `session` runs the library from Python. Imports numpy and onnx only.
"""

from featherweight.compiler.driver import compile_onnx
from featherweight.compiler.session import Session

__all__ = ["Session", "compile_onnx"]
