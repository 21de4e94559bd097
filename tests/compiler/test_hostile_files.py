"""Files that somebody broke, by chance or on purpose: one clear error or a right source, and nothing else."""

import multiprocessing
import random
import resource
import signal

import numpy as np
import onnx
import onnxruntime
import pytest
from backend_nodes import Case, load_cases
from onnx import TensorProto, helper
from onnx_files import make_model, node, save, tiny_convnet, value

from featherweight.compiler import compile_onnx
from featherweight.compiler.build import target_named
from featherweight.compiler.driver import generate
from featherweight.errors import DataError, FeatherweightError

SECONDS, MEMORY_BYTES = 60, 8 * 2**30
LARGEST_SEED = 20_000
INTEGERS = [0, 1, -1, 2, 7, -2, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63), 2**63 - 1, 1000, 65536]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e30, 1e-30]
TEXTS = [b"", b"no", b"\xff\xfe", b"linear", b"SAME_UPPER", b"constant", b"*/", b"../../x", b"\n"]
OPERATORS = [
    "Conv",
    "Add",
    "MatMul",
    "Resize",
    "Gather",
    "Softmax",
    "Pad",
    "Reshape",
    "MaxPool",
    "If",
    "Slice",
]


def break_attribute(node_proto, rng):
    if not node_proto.attribute:
        return
    attr = rng.choice(node_proto.attribute)
    if attr.type == onnx.AttributeProto.INT:
        attr.i = rng.choice(INTEGERS)
    elif attr.type == onnx.AttributeProto.FLOAT:
        attr.f = rng.choice(FLOATS)
    elif attr.type == onnx.AttributeProto.STRING:
        attr.s = rng.choice(TEXTS)
    elif attr.ints and rng.random() < 0.7:
        attr.ints[rng.randrange(len(attr.ints))] = rng.choice(INTEGERS)
    elif rng.random() < 0.5:
        attr.type = rng.choice([1, 2, 3, 4, 6, 7, 8])
    else:
        node_proto.attribute.remove(attr)


def break_names(node_proto, names, rng):
    side = rng.choice([node_proto.input, node_proto.output])
    change = rng.randrange(3)
    if change == 0:
        side.append(rng.choice(names))
    elif side and change == 1:
        side.pop()
    elif side:
        side[rng.randrange(len(side))] = rng.choice([*names, "", "nowhere", "*/ x", "../../e", "\n"])


def break_tensor(tensor, rng):
    change = rng.randrange(4)
    if change == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif change == 1:
        tensor.dims.append(rng.choice(INTEGERS))
    elif change == 2:
        tensor.data_type = rng.randrange(25)
    elif tensor.raw_data:
        raw = bytearray(tensor.raw_data)
        for _ in range(8):
            raw[rng.randrange(len(raw))] = rng.choice([0, 127, 128, 255])
        tensor.raw_data = bytes(raw)


def break_input(entry, rng):
    kind = entry.type.tensor_type
    change = rng.randrange(3)
    if change == 0 and kind.shape.dim:
        kind.shape.dim[rng.randrange(len(kind.shape.dim))].dim_value = rng.choice(INTEGERS)
    elif change == 1:
        kind.shape.dim.add().dim_value = rng.choice([0, 1, 2])
    else:
        kind.elem_type = rng.randrange(25)


def broken(seeds, number):
    """Return the bytes of a seed with some of its bytes, or of its parts, replaced."""
    rng = random.Random(number)
    raw = bytearray(rng.choice(seeds))
    if rng.random() < 0.3:
        for _ in range(rng.choice([1, 1, 2, 4])):
            raw[rng.randrange(len(raw))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        return bytes(raw)
    model = onnx.ModelProto()
    model.ParseFromString(bytes(raw))
    graph = model.graph
    names = [name for proto in graph.node for name in [*proto.input, *proto.output]] + [""]
    for _ in range(rng.choice([1, 1, 2, 3])):
        part = rng.randrange(5)
        if part == 0 and graph.initializer:
            break_tensor(rng.choice(graph.initializer), rng)
        elif part == 1 and graph.input:
            break_input(rng.choice(graph.input), rng)
        elif part == 2 and graph.node:
            break_names(rng.choice(graph.node), names, rng)
        elif part == 3 and graph.node:
            rng.choice(graph.node).op_type = rng.choice(
                [*OPERATORS, *(proto.op_type for proto in graph.node)]
            )
        elif graph.node:
            break_attribute(rng.choice(graph.node), rng)
    return model.SerializeToString()


def stop(*_):
    raise TimeoutError(f"took longer than {SECONDS} s")


def attempt(raw, number):
    """Return what is wrong with the compiler's way of taking a file, None where nothing is."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except Exception:
        return None
    signal.alarm(SECONDS)
    try:
        generate(model, target_named(["x86-64-v4", "generic-c"][number % 2])).source.encode("ascii")
    except FeatherweightError as error:
        if "\n" in str(error) or len(str(error)) > 600:
            return f"{number}: {str(error)[:200]!r}"
    except BaseException as error:
        return f"{number}: {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


def work(seeds, first, count, pipe):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, stop)
    found = []
    for number in range(first, first + count):
        problem = attempt(broken(seeds, number), number)
        found += [problem] if problem else []
    pipe.send(found)


def problems(seeds, first, count):
    """Break files in a process of its own: a crash or a flood of memory must not take the tests along."""
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(seeds, first, count, far))
    process.start()
    far.close()
    try:
        found = near.recv()
    except EOFError:
        found = ["the process died"]
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode} between {first} and {first + count}"
    return found


def test_hundreds_of_broken_networks():
    assert problems([tiny_convnet(1).SerializeToString()], 0, 400) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20_000, 2000))
def test_thousands_of_broken_node_cases(first):
    models = [case.model for case in load_cases().values() if isinstance(case, Case)]
    seeds = [model.SerializeToString() for model in models if model.ByteSize() < LARGEST_SEED]
    assert problems(seeds, first, 2000) == []


def relu(name="x", result="y", title="net"):
    model = make_model([node("Relu", [name], [result], name="the\n*/ node")], {name: [2]}, {result: [2]})
    model.graph.name = title
    return model


@pytest.mark.parametrize(
    "name",
    ["*/ int x; /*", "a\\", '"; evil(); "', "??/", "../../etc/passwd", "a\nb", "%s%n", "名前", "x" * 5000],
)
def test_hostile_names_stay_text(name, tmp_path):
    path = save(relu(name, name + "_out", name), tmp_path / "m.onnx")
    session = compile_onnx(path, tmp_path / "out" / "deep")
    (info,) = session.get_inputs()
    assert info.name == name
    assert session.run([name + "_out"], {name: np.float32([-1, 2])})[0].tolist() == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out"]


@pytest.mark.parametrize("kind", ["input", "initializer", "node", "graph"])
def test_names_that_are_no_text_are_refused(kind, tmp_path):
    model = relu("NAME", "y", "NAME" if kind == "graph" else "net")
    if kind == "initializer":
        model.graph.initializer.append(TensorProto(name="NAME", dims=[0], data_type=1))
    if kind == "node":
        model.graph.node[0].op_type = "NAME"
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(b"NAME", b"\xff\xfeXX"))
    with pytest.raises(DataError) as caught:
        compile_onnx(path, tmp_path / "out")
    assert str(caught.value).isprintable() and not (tmp_path / "out").exists()


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 8)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "w.bin").symlink_to(tmp_path / "secret.bin")
    model = relu()
    tensor = TensorProto(name="w", dims=[2], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    model.graph.initializer.append(tensor)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="outside the model's folder"):
        compile_onnx(folder / "m.onnx", tmp_path / "out")


def test_very_deep_networks_compile():
    count = 3000
    nodes = [node(["Relu", "Neg"][i % 2], [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(count)]
    model = make_model(nodes, {"t0": [4]}, {f"t{count}": [4]})
    compiled = generate(model, target_named("generic-c"))
    assert compiled.program.steps and len(compiled.source) < 5_000_000


def test_deeply_nested_bodies_are_refused():
    body = helper.make_graph([], "body", [], [value("z", [1])])
    for _ in range(60):
        branch = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
        if len(body.SerializeToString()) > 100_000:
            break
        body = helper.make_graph([branch], "body", [], [value("z", [1])])
    model = make_model([], {"c": []}, {"z": [1]})
    model.graph.node.extend(body.node)
    with pytest.raises(DataError):
        generate(model, target_named("generic-c"))


def test_names_said_twice():
    for side in ("input", "output"):
        model = relu()
        entries = getattr(model.graph, side)
        entries.append(entries[0])
        with pytest.raises(DataError, match="twice"):
            generate(model, target_named("generic-c"))


def test_empty_networks_and_constant_results(tmp_path):
    with pytest.raises(DataError, match="no network"):
        compile_onnx(save(make_model([], {}, {}), tmp_path / "m.onnx"), tmp_path / "out")
    model = make_model([], {"x": [2]}, {"x": [2], "k": [3]}, {"k": np.float32([1, 2, 3])})
    x, k = compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out").run(
        None, {"x": np.float32([4, 5])}
    )
    assert x.tolist() == [4, 5] and k.tolist() == [1, 2, 3]


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_functions_of_the_file_are_inlined(opset, tmp_path):
    inner = [helper.make_node("Neg", ["a"], ["n"]), helper.make_node("Exp", ["n"], ["b"])]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Decay", ["a"], ["b"], inner, imports[:1])
    graph = helper.make_graph(
        [helper.make_node("Decay", ["x"], ["y"], domain="own")], "g", [value("x", [3])], [value("y", [3])]
    )
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)
    path = save(model, tmp_path / "m.onnx")
    x = np.float32([0.5, 1, 2])
    got = compile_onnx(path, tmp_path / "out").run(None, {"x": x})[0]
    expected = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
    assert np.allclose(got, expected, rtol=1e-6)


def test_functions_that_call_themselves_are_refused():
    inner = [helper.make_node("Loop_", ["a"], ["b"], domain="own")]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Loop_", ["a"], ["b"], inner, imports)
    graph = helper.make_graph(
        [helper.make_node("Loop_", ["x"], ["y"], domain="own")], "g", [value("x", [3])], [value("y", [3])]
    )
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=9)
    with pytest.raises(DataError):
        generate(model, target_named("generic-c"))
