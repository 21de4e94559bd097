"""Tests of quantisation-aware training."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.errors import UsageError
from featherweight.shrink.qat import FakeQuantize, FakeQuantizeWeight, convert_qat, prepare_qat
from featherweight.shrink.quantize import quantize_onnx
from featherweight.shrink.quantizers import fake_affine, fake_symmetric


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.deep(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_fake_quantisers_equal_the_reference():
    weight = torch.randn(6, 4, 3, 3)
    expected = fake_symmetric(weight.numpy(), axis=0)
    np.testing.assert_allclose(FakeQuantizeWeight()(weight).numpy(), expected, atol=1e-6)
    x, quantizer = torch.randn(2, 5, 4, 4), FakeQuantize().train()
    found = quantizer(x)
    np.testing.assert_allclose(
        found.numpy(), fake_affine(x.numpy(), float(x.min()), float(x.max())), atol=1e-6
    )
    assert (quantizer(torch.zeros(3)) == 0).all()


def test_straight_through_gradient_and_frozen_range_in_eval():
    quantizer = FakeQuantize(decay=0.5).train()
    quantizer.observe(torch.tensor([-1.0, 1.0]))
    quantizer.eval()
    x = torch.tensor([-2.0, -0.9, 0.0, 0.9, 2.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert float(quantizer.high) == 1 and int(quantizer.steps) == 1


def test_placement_follows_the_fused_operations():
    qat = prepare_qat(Net())
    rounded = [n.args[0].name for n in qat.graph.nodes if n.name.startswith("fake_quantize")]
    # Input, stem's ReLU, the depthwise layer, the ReLU after the sum, the pool; neither the sum nor the
    # logits.
    assert rounded == ["x", "stem_2", "deep", "relu", "adaptive_avg_pool2d"]


def test_training_moves_weights_and_the_converted_network_quantises_alike(tmp_path):
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(8, 3, 8, 8))
    qat = prepare_qat(net).train()
    x = torch.randn(64, 3, 8, 8)
    y = (x.mean((2, 3)) @ torch.randn(3, 4)).argmax(1)
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(qat(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    plain = convert_qat(qat)
    assert not any("fake_quantize" in name for name, _ in plain.named_modules())
    torch.onnx.export(plain, (x[:2],), tmp_path / "f.onnx", dynamo=False, opset_version=18,
                      input_names=["image"], output_names=["y"],
                      dynamic_axes={"image": {0: "n"}})  # fmt: skip
    quantize_onnx(tmp_path / "f.onnx", tmp_path / "q.onnx", x.numpy())
    session = onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        simulated = qat.eval()(x).numpy()
    found = session.run(None, {"image": x.numpy()})[0]
    assert np.abs(found - simulated).max() < 0.03 * np.abs(simulated).max()


def test_untraceable_network_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="Branches cannot be traced"):
        prepare_qat(Branches())
