"""From an ONNX file to a running library: the same answers as onnxruntime, the same calls, clear errors."""

import ctypes
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from onnx_files import make_model, node, save, tiny_convnet

from featherweight.compiler import Session, compile_onnx, driver
from featherweight.compiler.build import build_library, find_compiler, target_named
from featherweight.compiler.driver import generate, random_inputs
from featherweight.errors import DataError, FeatherweightError, MissingExtraError, UsageError


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    path = save(tiny_convnet(), folder / "net.onnx")
    return path, folder / "out", compile_onnx(path, folder / "out", batch=2)


def reference(path, feeds):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def gap(got, expected):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, expected, strict=True))


def test_equals_onnxruntime_in_a_new_session_too(compiled):
    path, out, session = compiled
    feeds = random_inputs(session)
    expected = reference(path, feeds)
    assert gap(session.run(None, feeds), expected) < 1e-5
    assert gap(Session(out).run(["logits"], feeds), expected) < 1e-5
    assert gap(session.run(None, feeds), expected) < 1e-5, "the second run sees what the first left"


def test_the_calls_are_those_of_onnxruntime(compiled):
    _, _, session = compiled
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape, image.type) == ("image", (2, 3, 17, 15), "tensor(float)")
    assert logits.name == "logits"


def test_the_folder_holds_all_that_is_needed(compiled):
    _, out, _ = compiled
    names = {path.name for path in out.iterdir()}
    assert names == {"model.c", "model.h", "model.weights", "libmodel.so", "main.c", "report.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["macs"] == sum(layer["macs"] for layer in report["layers"]) > 0
    assert report["arena_bytes"] < 3 * report["largest_live_bytes"]


def test_passes_leave_few_steps(compiled):
    _, out, _ = compiled
    layers = json.loads((out / "report.json").read_text())["layers"]
    kernels = [layer["kernel"].split()[0] for layer in layers]
    assert kernels == [
        "layout",
        "convolution",
        "depthwise",
        "convolution",
        "winograd",
        "vector",
        "layout",
        "product,",
    ]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "'image' is missing"),
        ({"picture": np.zeros(1)}, "No input 'picture'"),
        ({"image": np.zeros((1, 3, 17, 15), np.float32)}, "compiled for float32"),
        ({"image": np.zeros((2, 3, 17, 15))}, "float64"),
    ],
)
def test_wrong_inputs_are_refused(compiled, feeds, message):
    with pytest.raises(UsageError, match=message):
        compiled[2].run(None, feeds)


def test_wrong_requests_are_refused(compiled, tmp_path):
    path, out, session = compiled
    with pytest.raises(UsageError, match="No output 'x'"):
        session.run(["x"], random_inputs(session))
    with pytest.raises(DataError, match="No compiled network"):
        Session(tmp_path)
    with pytest.raises(DataError, match="expected one of native"):
        compile_onnx(path, tmp_path / "out", target="z80")
    with pytest.raises(UsageError, match="threads=0"):
        compile_onnx(path, tmp_path / "out", threads=0)
    shutil.copy(out / "libmodel.so", tmp_path)
    with pytest.raises(DataError, match=r"model\.weights is missing"):
        Session(tmp_path)


def test_a_second_build_comes_from_the_cache(compiled, tmp_path):
    path, _, _ = compiled
    compile_onnx(path, tmp_path / "again", batch=2)
    assert json.loads((tmp_path / "again/report.json").read_text())["seconds"]["cached"]


def test_the_source_is_the_same_every_time(compiled):
    path, out, _ = compiled
    again = generate(path, target_named("native"), batch=2)
    assert again.source == (out / "model.c").read_text()
    assert again.weights == (out / "model.weights").read_bytes()


def test_no_compiler_names_the_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(MissingExtraError, match="apt install gcc"):
        find_compiler(target_named("native"))


def test_targets_that_do_not_run_here_give_no_session(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "runs_on_this_machine", lambda target: False)
    assert compile_onnx(compiled[0], tmp_path / "out", batch=2) is None
    assert (tmp_path / "out/libmodel.so").is_file()


def test_a_failing_compiler_is_reported(tmp_path):
    (tmp_path / "bad.c").write_text("int main(void) { return undeclared; }\n")
    with pytest.raises(FeatherweightError, match="undeclared"):
        build_library([tmp_path / "bad.c"], tmp_path / "lib.so", target_named("native"))


def test_the_example_program_runs(compiled):
    _, out, session = compiled
    program = out.parent / "example"
    subprocess.run(
        [
            find_compiler(target_named("native")),
            "-O1",
            "-march=native",
            "main.c",
            "model.c",
            "-lm",
            "-o",
            program,
        ],
        cwd=out,
        check=True,
    )
    done = subprocess.run([program, out / "model.weights"], capture_output=True, text=True, check=True)
    zeros = {info.name: np.zeros(info.shape, info.dtype) for info in session.get_inputs()}
    numbers = [float(word) for word in done.stdout.split(":")[1].split()]
    assert numbers == pytest.approx(session.run(None, zeros)[0].ravel()[:5], rel=1e-4, abs=1e-5)


def test_portable_c99_is_clean_and_equal(compiled, tmp_path):
    path, _, _ = compiled
    compiled_c = generate(path, target_named("generic-c"), batch=2)
    (tmp_path / "model.c").write_text(compiled_c.source)
    (tmp_path / "model.h").write_text(compiled_c.header)
    (tmp_path / "model.weights").write_bytes(compiled_c.weights)
    strict = ["-Wall", "-Wextra", "-Werror", "-O1"]
    build_library([tmp_path / "model.c"], tmp_path / "libmodel.so", target_named("generic-c"), extra=strict)
    feeds = random_inputs(compiled[2])
    assert gap(Session(tmp_path).run(None, feeds), reference(path, feeds)) < 1e-5


SANITIZED = """
import sys
import numpy as np
from featherweight.compiler import Session
from featherweight.compiler.driver import random_inputs
session = Session(sys.argv[1])
assert np.isfinite(session.run(None, random_inputs(session))[0]).all()
"""


@pytest.mark.parametrize("target", ["native", "generic-c"])
def test_sanitizers_find_nothing(compiled, target, tmp_path):
    path, _, _ = compiled
    machine = target_named(target)
    runtime = subprocess.run(
        [find_compiler(machine), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler has no AddressSanitizer")
    result = generate(path, machine)
    (tmp_path / "model.c").write_text(result.source)
    (tmp_path / "model.h").write_text(result.header)
    (tmp_path / "model.weights").write_bytes(result.weights)
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover", "-O1", "-g"]
    build_library([tmp_path / "model.c"], tmp_path / "libmodel.so", machine, extra=flags)
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_contexts_are_independent(compiled):
    _, out, session = compiled
    other = Session(out)
    first, second = random_inputs(session, seed=1), random_inputs(session, seed=2)
    expected = session.run(None, first)[0]
    other.run(None, second)
    assert (session.run(None, first)[0] == expected).all()
    assert isinstance(session._context, ctypes.c_void_p) and session._context.value != other._context.value


def test_outputs_may_be_inputs_or_constants(tmp_path):
    model = make_model(
        [node("Identity", ["x"], ["y"]), node("Relu", ["x"], ["z"])],
        {"x": [2, 3]},
        {"y": [2, 3], "z": [2, 3], "x": [2, 3], "k": [2]},
        {"k": np.float32([1, 2])},
    )
    session = compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    x = np.float32([[1, -2, 3], [4, 5, -6]])
    y, z, same, k = session.run(None, {"x": x})
    assert (y == x).all() and (z == np.maximum(x, 0)).all() and (same == x).all() and k.tolist() == [1, 2]


def test_compiling_again_into_the_same_folder_loads_the_new_network(tmp_path):
    x = np.float32([-1, 2])
    for op, expected in (("Relu", [0, 2]), ("Neg", [1, -2])):
        model = make_model([node(op, ["x"], ["y"])], {"x": [2]}, {"y": [2]})
        session = compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out")
        assert session.run(None, {"x": x})[0].tolist() == expected
