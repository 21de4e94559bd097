"""A model small enough to compute by hand, for predict and evaluate: the brightest channel wins."""

import json

import onnx
from onnx import TensorProto, helper

from featherweight.data.preprocess import Preprocess

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_model(path, labels=tuple(COLOURS), metadata=True):
    """Write a network whose logits are the mean red, green and blue; return its preprocessing."""
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], keepdims=0)]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "brightest", [image], [logits], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    spec = Preprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    if metadata:
        props = {"featherweight.preprocess": spec.to_json(), "featherweight.labels": json.dumps(labels)}
        helper.set_model_props(model, props)
    onnx.save(model, path)
    return spec
