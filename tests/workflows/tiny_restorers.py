"""Small super-resolution networks as ONNX files, written node by node: quick to make, quick to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_restorer(
    path: Path,
    scale: int = 2,
    channels: int = 3,
    attention: bool = False,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    seed: int = 0,
) -> Path:
    """Write a network of three 3 x 3 convolutions (radius 3 at stride 1) and a pixel shuffle.

    `attention` scales the maps by their mean and deviation over the whole image, as IMDN does; `size` fixes
    height and width; `stride` works on a coarser map.
    """
    rng = np.random.default_rng(seed)
    width, wide = 6, channels * (scale * stride) ** 2
    shapes = {"w0": (width, channels, 3, 3), "w1": (width, width, 3, 3), "w2": (wide, width, 3, 3)}
    weights = {name: rng.normal(0, 0.35 / np.sqrt(shape[1]), shape) for name, shape in shapes.items()}
    # the identity, so that the result resembles a picture
    weights["w0"][:channels, :, 1, 1] += np.eye(channels)
    weights["w1"][:channels, :channels, 1, 1] += np.eye(channels)
    for colour in range(channels):
        weights["w2"][
            colour * (scale * stride) ** 2 : (colour + 1) * (scale * stride) ** 2, colour, 1, 1
        ] += 1
    keep = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["a"], strides=[stride, stride], **keep),
        helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.05),
        helper.make_node("Conv", ["b", "w1"], ["c"], **keep),
    ]
    last = "c"
    initializers = [
        numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()
    ]
    if attention:
        initializers.append(numpy_helper.from_array(np.array([2, 3], np.int64), "axes"))
        nodes += [
            helper.make_node("ReduceMean", ["c", "axes"], ["mean"]),
            helper.make_node("Sub", ["c", "mean"], ["centred"]),
            helper.make_node("Mul", ["centred", "centred"], ["squared"]),
            helper.make_node("ReduceMean", ["squared", "axes"], ["variance"]),
            helper.make_node("Sqrt", ["variance"], ["deviation"]),
            helper.make_node("Add", ["mean", "deviation"], ["contrast"]),
            helper.make_node("Sigmoid", ["contrast"], ["gate"]),
            helper.make_node("Mul", ["c", "gate"], ["gated"]),
        ]
        last = "gated"
    nodes += [
        helper.make_node("Conv", [last, "w2"], ["d"], **keep),
        helper.make_node("DepthToSpace", ["d"], ["restored"], blocksize=scale * stride, mode="CRD"),
    ]
    height, wide_ = size or ("height", "width")
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, channels, height, wide_])],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, [1, channels, None, None])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def picture(height: int, width: int, channels: int = 3, dtype: str = "uint8") -> np.ndarray:
    """Return a smooth picture with some edges, the same at each call."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    planes = [
        0.5 + 0.3 * np.sin(rows / (4 + k) + columns / 9) + 0.15 * ((rows // 7 + columns // 5 + k) % 2)
        for k in range(channels)
    ]
    most = np.iinfo(dtype).max
    return np.rint(np.clip(np.stack(planes, -1), 0, 1) * most).astype(dtype)
