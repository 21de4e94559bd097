"""16-bit floats: as stored weights they are widened once; as activations they are refused with one line."""

import numpy as np
import pytest
from onnx import TensorProto
from onnx_files import make_model, node, save

from featherweight.compiler import compile_onnx
from featherweight.errors import DataError


def test_half_weights_are_widened(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float16)
    nodes = [node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT), node("Conv", ["x", "wide"], ["y"])]
    model = make_model(nodes, {"x": [1, 3, 5, 5]}, {"y": [1, 4, 3, 3]}, {"w": weight})
    session = compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    x = np.ones((1, 3, 5, 5), np.float32)
    expected = weight.astype(np.float64).sum((1, 2, 3))
    assert np.allclose(session.run(None, {"x": x})[0][0, :, 0, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_activations_are_refused(kind, tmp_path):
    model = make_model([node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]})
    for entry in (model.graph.input[0], model.graph.output[0]):
        entry.type.tensor_type.elem_type = kind
    with pytest.raises(DataError, match="float16"):
        compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
