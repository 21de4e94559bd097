"""ONNX's own node cases through the compiler: `python tests/compiler/backend_nodes.py` writes the list anew.

`backend_nodes.tsv` holds every case of the installed ONNX as `name, operator, outcome, reason`. A case is
*pass* (compiled and equal to ONNX's data within its tolerances) or *skip* (refused for the reason given); the
tests hold the compiler to the list, so that none fails or stops working silently.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from featherweight.compiler.build import build_library, target_named
from featherweight.compiler.driver import generate, write_files
from featherweight.compiler.reader import MIN_OPSET
from featherweight.compiler.session import Session
from featherweight.errors import DataError

LIST = Path(__file__).with_name("backend_nodes.tsv")
FIXED_INPUTS = {
    "AffineGrid": (1,),
    "Clip": (),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "CumProd": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "MaxUnpool": (2,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    **{
        f"Reduce{op}": (1,)
        for op in ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]
    },
}
"""Inputs that a compiled network must know beforehand: the cases' data become constants of the file."""


@dataclass
class Case:
    """One case, with its model made static, and the data."""

    name: str
    op: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray]
    outputs: list[np.ndarray]
    rtol: float
    atol: float


def load_cases() -> dict[str, Case | str]:
    """Return all cases by name; a string says why a case is no single numeric network."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return {case.name: _prepare(case) for case in found}


def _prepare(case) -> Case | str:
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    op = model.graph.node[0].op_type if model.graph.node else ""
    inputs, outputs = case.data_sets[0]
    arrays = {}
    for value, data in zip(model.graph.input, inputs, strict=False):
        if isinstance(data, onnx.TensorProto):
            data = numpy_helper.to_array(data)
        if not isinstance(data, np.ndarray | np.generic):
            return f"{op}: input is a {type(data).__name__}"
        arrays[value.name] = np.asarray(data)
    for data in outputs:
        if not isinstance(data, np.ndarray | np.generic | onnx.TensorProto):
            return f"{op}: output is a {type(data).__name__}"
    expected = [
        numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else np.asarray(data)
        for data in outputs
    ]
    _fix(model, arrays)
    for entry in model.opset_import:
        # A definition that is older than opset 13 and still the newest means the same there.
        if entry.domain == "":
            entry.version = max(entry.version, MIN_OPSET)
    return Case(case.name, op, model, arrays, expected, case.rtol, case.atol)


def _fix(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> None:
    """Turn inputs that decide shapes into constants, and give all others the shape of their data."""
    fixed = {
        node.input[index]
        for node in model.graph.node
        for index in FIXED_INPUTS.get(node.op_type, ())
        if index < len(node.input) and node.input[index]
    }
    kept = []
    for value in model.graph.input:
        if value.name in fixed and value.name in arrays:
            model.graph.initializer.append(numpy_helper.from_array(arrays.pop(value.name), value.name))
        elif value.name in arrays:
            dims = value.type.tensor_type.shape.dim
            if len(dims) == arrays[value.name].ndim:
                for dim, size in zip(dims, arrays[value.name].shape, strict=True):
                    dim.dim_value = size
            kept.append(value)
        else:
            kept.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)


def build_cases(
    cases: dict[str, Case],
    folder: Path,
    target: str = "native",
    extra: tuple[str, ...] = ("-O1",),
    build: bool = True,
) -> dict[str, str]:
    """Compile all cases into one library in `folder`; return the reason for each that is refused."""
    machine = target_named(target)
    refused, sources = {}, []
    for index, (name, case) in enumerate(cases.items()):
        prefix = f"m{index}"
        try:
            compiled = generate(case.model, machine, prefix=prefix)
        except DataError as error:
            refused[name] = str(error)
            continue
        write_files(compiled, folder, prefix=prefix)
        sources.append(folder / f"{prefix}.c")
    (folder / "main.c").unlink(missing_ok=True)
    if build:
        build_library(sources, folder / "libmodel.so", machine, extra=extra)
    return refused


def compare(case: Case, folder: Path, index: int) -> str:
    """Run one case and return what differs, or an empty string."""
    session = Session(folder, prefix=f"m{index}")
    results = session.run(None, {info.name: case.inputs[info.name] for info in session.get_inputs()})
    if len(results) != len(case.outputs):
        return f"{len(results)} outputs, expected {len(case.outputs)}"
    for got, expected in zip(results, case.outputs, strict=True):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"{got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
        if expected.dtype.kind == "f":
            if not np.allclose(got, expected, rtol=case.rtol, atol=max(case.atol, 1e-6), equal_nan=True):
                return f"differs by {np.nanmax(np.abs(got - expected)):.3g}"
        elif not (got == expected).all():
            return f"{(got != expected).sum()} of {got.size} elements differ"
    return ""


def reason_of(text: str) -> str:
    """Return a refusal without the names of the case's node and tensors."""
    return text.split("): ", 1)[-1].split("is not supported: ", 1)[-1].rstrip(".").replace("\t", " ")[:110]


def write_list() -> int:
    """Run every case, write the list, and return how many fail."""
    everything = load_cases()
    cases = {name: case for name, case in everything.items() if isinstance(case, Case)}
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        refused = build_cases(cases, folder)
        numbers = {name: index for index, name in enumerate(cases)}
        rows = []
        for name, case in sorted(everything.items()):
            if isinstance(case, str):
                rows.append((name, case.split(":")[0], "skip", case.split(": ")[1]))
            elif name in refused:
                rows.append((name, case.op, "skip", reason_of(refused[name])))
            else:
                problem = compare(case, folder, numbers[name])
                failed += bool(problem)
                rows.append((name, case.op, "fail" if problem else "pass", problem))
    LIST.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(1 if write_list() else 0)
