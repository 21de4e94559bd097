"""What is read from a restoration network's graph, against running it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from featherweight.errors import DataError
from featherweight.export.restoration import (
    bytes_per_pixel,
    export_restorer,
    find_reach,
    with_averages,
    with_statistics,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "workflows"))
from tiny_restorers import write_restorer

RNG = np.random.default_rng(0)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)


@pytest.mark.parametrize(("stride", "radius"), [(1, 3), (2, 5)])
def test_radius_is_how_far_a_pixel_is_felt(tmp_path: Path, stride: int, radius: int) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx", stride=stride))
    reach = find_reach(proto)
    assert (reach.radius, reach.stride, reach.statistics, reach.unshared) == (radius, stride, (), ())
    image = RNG.random((1, 3, 40, 40), np.float32)
    changed = image.copy()
    changed[:, :, 20, 20] += 1
    felt = np.abs(run(proto, {"image": image})[0] - run(proto, {"image": changed})[0]).max(axis=(0, 1)) > 0
    rows = np.flatnonzero(felt.any(axis=1)) // 2
    assert max(20 - rows.min(), rows.max() - 20) <= radius + stride - 1
    assert max(20 - rows.min(), rows.max() - 20) >= radius - stride + 1


def test_averages_become_inputs_and_outputs(tmp_path: Path) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx", attention=True))
    reach = find_reach(proto)
    assert [(entry.channels, entry.jump) for entry in reach.statistics] == [(6, 1), (6, 1)]
    image = RNG.random((1, 3, 24, 20), np.float32)
    expected, *own = run(with_averages(proto, reach.statistics), {"image": image})
    np.testing.assert_array_equal(expected, run(proto, {"image": image})[0])
    shared = with_statistics(proto, reach.statistics)
    onnx.checker.check_model(shared)
    given = {f"statistic_{index}": value for index, value in enumerate(own)}
    mask = np.zeros((1, 1, 24, 20), np.float32)
    mask[:, :, 2:10, 3:] = 1
    got, *shares = run(shared, {"image": image, "mask_1": mask, **given})
    np.testing.assert_allclose(got, expected, atol=1e-6)
    maps = onnx.ModelProto()
    maps.CopyFrom(proto)
    maps.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None))
    inner = run(maps, {"image": image})[1]
    np.testing.assert_allclose(shares[0], (inner * mask).mean((2, 3), keepdims=True), atol=1e-6)
    np.testing.assert_allclose(
        shares[1], (np.square(inner - own[0]) * mask).mean((2, 3), keepdims=True), atol=1e-6
    )


def test_coarser_maps_have_masks_of_their_own(tmp_path: Path) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx", attention=True, stride=2))
    reach = find_reach(proto)
    assert {entry.jump for entry in reach.statistics} == {2}
    names = {value.name for value in with_statistics(proto, reach.statistics).graph.input}
    assert names == {"image", "mask_2", "statistic_0", "statistic_1"}


def test_whole_maps_that_cannot_be_shared_are_named(tmp_path: Path) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx"))
    for node in proto.graph.node:
        if node.op_type == "LeakyRelu":
            node.op_type = "InstanceNormalization"
            node.input.extend(["w0", "w0"])
            del node.attribute[:]
    assert find_reach(proto).unshared == ("InstanceNormalization",)


def test_memory_is_that_of_the_maps_alive_together(tmp_path: Path) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx", scale=2))
    # the last convolution's 12 channels beside the shuffled 3 x 4 values, 4 bytes each
    assert bytes_per_pixel(proto) == pytest.approx(4 * (12 + 12))


def test_an_input_that_is_no_image_is_refused(tmp_path: Path) -> None:
    proto = onnx.load(write_restorer(tmp_path / "a.onnx"))
    del proto.graph.input[0].type.tensor_type.shape.dim[0]
    with pytest.raises(DataError, match="3 dimensions"):
        find_reach(proto)


@pytest.mark.parametrize("name", ["imdn_x2", "cfsr_x2", "dscf_x4"])
def test_networks_of_the_registry_take_any_size(tmp_path: Path, name: str) -> None:
    import torch

    from featherweight.registry import create_model

    torch.manual_seed(0)
    small = {"imdn_x2": {"channels": 16, "depth": 2}, "cfsr_x2": {"channels": 8, "depths": (1, 1)}}
    model = create_model(name, **small.get(name, {})).eval().fuse()
    export_restorer(model, tmp_path / "a.onnx")
    image = RNG.random((1, 3, 31, 45), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(image)).numpy()
    got = run(onnx.load(tmp_path / "a.onnx"), {"image": image})[0]
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    statistics = find_reach(onnx.load(tmp_path / "a.onnx")).statistics
    assert len(statistics) == (4 if name == "imdn_x2" else 0)
