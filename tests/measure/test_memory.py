"""Tests of the peak memory."""

import numpy as np
from onnx import TensorProto, helper, save

from featherweight.measure.memory import peak_memory_bytes


def test_a_file_with_more_weights_takes_more_memory(tmp_path):
    peaks = []
    for width in (8, 2048):
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])
        content = np.ones(width * width, np.float32)
        weight = helper.make_tensor("w", TensorProto.FLOAT, [width, width], content.tobytes(), raw=True)
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        path = tmp_path / f"{width}.onnx"
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        peaks.append(peak_memory_bytes(path))
    assert 0 <= peaks[0] < 2048 * 2048 * 4 <= peaks[1] < 10 * 2048 * 2048 * 4
