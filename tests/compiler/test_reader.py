"""Reading ONNX files: shapes, folding, and clear errors for broken and hostile files."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import make_model, node, save, tiny_convnet, value

from featherweight.compiler import compile_onnx
from featherweight.compiler.graph import Node, sort_nodes
from featherweight.compiler.reader import read_model
from featherweight.errors import DataError, FeatherweightError


def test_free_dimensions_are_fixed_by_the_caller():
    model = tiny_convnet()
    assert read_model(model).shape("image") == (1, 3, 17, 15)
    assert read_model(model, batch=4).shape("logits") == (4, 7)
    assert read_model(model, {"image": (2, 3, 17, 15)}).shape("logits") == (2, 7)


def test_shape_arithmetic_is_folded():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "rest"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "rest": np.array([-1])}
    graph = read_model(make_model(nodes, {"x": [2, 3, 4]}, {"y": [2, 12]}, constants))
    assert [found.op for found in graph.nodes] == ["Reshape"]
    assert graph.shape("y") == (2, 12)


def test_unsorted_nodes_are_sorted():
    model = tiny_convnet()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    assert next(found.name for found in read_model(model).nodes) == "stem"


def test_sort_names_what_lies_on_a_cycle():
    ring = [Node("Relu", "a", ["y"], ["x"]), Node("Relu", "b", ["x"], ["y"]), Node("Relu", "c", ["i"], ["o"])]
    done, left = sort_nodes(ring, ["i"])
    assert [n.name for n in done] == ["c"] and [n.name for n in left] == ["a", "b"]


def relu_model(shape, **replaced):
    return make_model([node("Relu", ["x"], ["y"])], {"x": shape}, {"y": shape}, **replaced)


def cyclic():
    return make_model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])], {"x": [2]}, {"b": [2]})


def with_subgraph():
    body = helper.make_graph([], "body", [], [value("z", [1])])
    branch = helper.make_node("If", ["c"], ["y"], "choice", then_branch=body, else_branch=body)
    return make_model([branch], {"c": []}, {"y": [1]})


def with_custom_operator():
    model = relu_model([2])
    model.graph.node[0].domain = "com.example"
    model.graph.node[0].op_type = "Magic"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model


def with_negative_dims():
    model = relu_model([2])
    model.graph.initializer.append(TensorProto(name="w", dims=[-3], data_type=1))
    return model


def with_short_data():
    model = relu_model([2])
    model.graph.initializer.append(TensorProto(name="w", dims=[1000], data_type=1, raw_data=b"1234"))
    return model


def huge_fill():
    nodes = [node("ConstantOfShape", ["s"], ["big"]), node("Add", ["big", "x"], ["y"])]
    return make_model(nodes, {"x": [1]}, {"y": [None]}, {"s": np.array([2**20, 2**20])})


def endless_range():
    nodes = [node("Range", ["a", "b", "c"], ["r"]), node("Add", ["r", "x"], ["y"])]
    constants = {"a": np.float32(0), "b": np.float32(1e30), "c": np.float32(1e-9)}
    return make_model(nodes, {"x": [1]}, {"y": [None]}, constants)


HOSTILE = {
    "cycle": (cyclic, "'a'|'b'|cycle"),
    "subgraph": (with_subgraph, "choice.*If"),
    "custom operator": (with_custom_operator, "com.example::Magic"),
    "negative size": (with_negative_dims, r"'w'.*\[-3\]"),
    "too little data": (with_short_data, "'w'"),
    "absurd fill": (huge_fill, "the_constantofshape"),
    "endless range": (endless_range, "the_range"),
    "absurd input": (lambda: relu_model([2**40]), "'x'.*absurd"),
    "open size": (lambda: relu_model([1, "width"]), "--shape x="),
    "old opset": (lambda: relu_model([2], opset=9), "opset 9"),
    "new opset": (lambda: relu_model([2], opset=99), "opset 99"),
    "unknown tensor": (
        lambda: make_model([node("Relu", ["q"], ["y"])], {"x": [1]}, {"y": [1]}),
        "unknown.*'q'",
    ),
    "twice": (
        lambda: make_model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])], {"x": [1]}, {"y": [1]}),
        "defined twice",
    ),
    "shapes that do not fit": (
        lambda: make_model([node("Add", ["x", "z"], ["y"])], {"x": [2], "z": [3]}, {"y": [3]}),
        "the_add",
    ),
    "no such output": (lambda: make_model([node("Relu", ["x"], ["y"])], {"x": [1]}, {"q": [1]}), "'q'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_clear_error(name, tmp_path):
    make, message = HOSTILE[name]
    path = save(make(), tmp_path / "bad.onnx")
    with pytest.raises(DataError, match=message) as caught:
        compile_onnx(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "sub/../../secret.bin"])
def test_external_data_stays_in_the_folder(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 64)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    model = relu_model([2])
    tensor = TensorProto(name="w", dims=[2], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    model.graph.initializer.append(tensor)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="outside the model's folder"):
        read_model(folder / "m.onnx")


def test_external_data_are_read(tmp_path):
    model = tiny_convnet()
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    again = read_model(tmp_path / "m.onnx")
    plain = read_model(tiny_convnet())
    assert all((again.constants[name] == value).all() for name, value in plain.constants.items())
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="ends after"):
        read_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x08" + b"\xff" * 100])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.onnx"):
        read_model(path)
    with pytest.raises(DataError, match="No ONNX file"):
        read_model(tmp_path / "absent.onnx")


def test_mutated_bytes_never_crash():
    raw = bytearray(tiny_convnet(batch=1).SerializeToString())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(raw)
        # The weights are most of the file; the structure lies at the start of each message.
        for place in rng.integers(0, len(raw), 3):
            broken[place] = rng.integers(0, 256)
        model = onnx.ModelProto()
        try:
            model.ParseFromString(bytes(broken))
        except Exception:
            continue
        try:
            read_model(model)
        except FeatherweightError:
            refused += 1
    assert refused
