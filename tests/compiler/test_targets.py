"""Networks for other machines: compiled here, run in an emulator, held to onnxruntime."""

import json
import shutil
import subprocess

import numpy as np
import onnxruntime
import pytest
from backend_nodes import load_cases
from onnx_files import make_model, node, save, tiny_convnet
from test_backend_nodes import FIRST
from test_quantised import Builder

from featherweight.compiler import compile_onnx
from featherweight.compiler.build import TARGETS, build_library, find_compiler, target_named, write_whole
from featherweight.compiler.driver import random_inputs
from featherweight.compiler.foreign import EMULATORS, ForeignSession
from featherweight.errors import DataError, MissingExtraError, UsageError

FOREIGN = sorted(EMULATORS)
SAMPLE = 12
"""Every so many of the operators' first node cases run in the emulators."""


def toolchain(name):
    """Skip the test where a compiler or emulator is absent; the reason names the package."""
    try:
        find_compiler(target_named(name))
    except MissingExtraError as error:
        pytest.skip(str(error))
    program, package = EMULATORS[name]
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here: apt install {package}")


def opened(path, folder, name, **options):
    toolchain(name)
    try:
        assert compile_onnx(path, folder, target=name, **options) is None
    except MissingExtraError as error:
        pytest.skip(str(error))
    return ForeignSession(folder, target_named(name))


def reference(path, feeds):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_network_equals_onnxruntime(name, tmp_path):
    path = save(tiny_convnet(), tmp_path / "net.onnx")
    session = opened(path, tmp_path / "out", name, batch=2)
    feeds = random_inputs(session)
    (got,), (expected,) = session.run(["logits"], feeds), reference(path, feeds)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    with pytest.raises(UsageError, match="No output 'x'"):
        session.run(["x"], feeds)


@pytest.mark.parametrize("name", FOREIGN)
def test_bytes_are_the_same_to_the_bit(name, tmp_path):
    """All paths of the 8-bit kernels give the bits of the machine at hand."""
    b = Builder(np.int8)
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.op("Relu", b.conv(x, 20, 3, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1])), 0.03, 0)
    x = b.through_bytes(b.conv(x, 20, 1, 3, 3, group=20, pads=[1, 1, 1, 1]), 0.04, 100)
    y = b.through_bytes(b.conv(x, 40, 20, 1, 1), 0.2, 120)
    s = b.through_bytes(b.op("Sigmoid", y), 1 / 256, 0)
    y = b.through_bytes(b.op("Mul", y, s), 0.15, 10)
    y = b.through_bytes(b.conv(y, 40, 10, 3, 3, group=4, pads=[1, 1, 1, 1]), 0.5, 120)
    path = b.save(tmp_path / "m.onnx", y, {"x": [2, 3, 21, 18]}, [2, 40, 11, 9])
    session = opened(path, tmp_path / "out", name)
    feeds = random_inputs(session)
    here = compile_onnx(path, tmp_path / "here")
    assert (session.run(None, feeds)[0] == here.run(None, feeds)[0]).all()


@pytest.mark.parametrize("name", FOREIGN)
def test_no_input_several_outputs_and_integers(name, tmp_path):
    nodes = [
        node("TopK", ["x", "two"], ["v", "i"]),
        node("Relu", ["k"], ["r"]),
        node("Greater", ["x", "zero"], ["b"]),
        node("Cast", ["b"], ["g"], to=6),
    ]
    constants = {"two": np.array([2]), "k": np.float32([-1, 2]), "zero": np.float32(0)}
    outputs = {"v": [3, 2], "i": [3, 2], "r": [2], "g": [3, 4]}
    model = make_model(nodes, {"x": [3, 4]}, outputs, constants)
    for output, kind in (("i", 7), ("g", 6)):
        next(o for o in model.graph.output if o.name == output).type.tensor_type.elem_type = kind
    path = save(model, tmp_path / "m.onnx")
    session = opened(path, tmp_path / "out", name)
    feeds = random_inputs(session)
    for got, expected in zip(session.run(None, feeds), reference(path, feeds), strict=True):
        assert got.dtype == expected.dtype and (got == expected).all()
    path = save(make_model([node("Neg", ["k"], ["y"])], {}, {"y": [2]}, {"k": constants["k"]}), path)
    assert opened(path, tmp_path / "out", name).run(None, {})[0].tolist() == [1, -2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_a_sample_of_the_node_cases(name, tmp_path):
    cases = load_cases()
    names = list(FIRST.values())[::SAMPLE]
    for index, case in enumerate(cases[name] for name in names):
        folder = tmp_path / str(index)
        path = save(case.model, tmp_path / f"{index}.onnx")
        session = opened(path, folder, name)
        results = session.run(None, {info.name: case.inputs[info.name] for info in session.get_inputs()})
        for got, expected in zip(results, case.outputs, strict=True):
            np.testing.assert_allclose(got, expected, case.rtol, max(case.atol, 1e-6), err_msg=case.name)


def test_wasm_has_a_loader_and_no_imports(tmp_path):
    session = opened(save(tiny_convnet(1), tmp_path / "net.onnx"), tmp_path / "out", "wasm32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"model.c", "model.h", "model.weights", "model.wasm", "model.mjs", "main.mjs", "report.json"}
    assert names == expected
    script = (
        "const m = new WebAssembly.Module(require('fs').readFileSync(process.argv[1]));"
        "console.log(JSON.stringify([WebAssembly.Module.imports(m).length,"
        " WebAssembly.Module.exports(m).map(e => e.name)]))"
    )
    command = ["node", "-e", script, tmp_path / "out/model.wasm"]
    imports, exports = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert imports == 0
    assert {"memory", "model_init", "model_run", "model_description"} <= set(exports)
    shown = subprocess.run(["node", "main.mjs"], cwd=tmp_path / "out", capture_output=True, check=True).stdout
    zeros = {info.name: np.zeros(info.shape, info.dtype) for info in session.get_inputs()}
    numbers = [float(word) for word in shown.decode().split(":")[1].split()]
    assert numbers == pytest.approx(session.run(None, zeros)[0].ravel()[:5])


def test_wasm_has_one_thread(tmp_path):
    path = save(tiny_convnet(), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="wasm32 has no threads"):
        compile_onnx(path, tmp_path / "out", target="wasm32", threads=2)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_missing_toolchain_names_its_package(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = save(tiny_convnet(), tmp_path / "net.onnx")
    with pytest.raises(MissingExtraError, match=TARGETS[name].package):
        compile_onnx(path, tmp_path / "out", target=name)
    with pytest.raises(MissingExtraError, match=EMULATORS[name][1]):
        ForeignSession(tmp_path, target_named(name))


def test_a_toolchain_without_its_library_names_the_package(tmp_path):
    (tmp_path / "lone.c").write_text("#include <no_such_header.h>\n")
    with pytest.raises(MissingExtraError, match="apt install gcc"):
        build_library([tmp_path / "lone.c"], tmp_path / "lib.so", target_named("native"))


def test_only_emulated_targets_have_a_foreign_session(tmp_path):
    with pytest.raises(UsageError, match="no emulator is known"):
        ForeignSession(tmp_path, target_named("x86-64-v3"))
    with pytest.raises(DataError, match="wasm32"):
        target_named("wasm64")


def test_a_link_in_the_folder_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.c").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "model.c", b"code")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "model.c").read_text() == "code" and not (tmp_path / "model.c").is_symlink()
