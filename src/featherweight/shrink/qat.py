"""Quantisation-aware fine-tuning: train with the rounding that the int8 file will do.

`prepare_qat` folds the batch norms and puts simulated quantisers where the int8 file rounds: on the weights
of convolutions and linear layers (symmetric, per channel, narrow range) and on activations (affine uint8
whose range is a moving average of batch minima and maxima), after the ReLU where one follows and not between
operations that run as one. Rounding has the gradient of the identity inside the range and none outside. After
training, `convert_qat` gives back an ordinary float network whose export `quantize_onnx` rounds the same way.

Training starts from a trained float network, with a small learning rate (the whitepaper: SGD, 1e-5) and
without averaged weights: a mean of weights rounds differently from every one of them.

Reference: Krishnamoorthi, arXiv 1806.08342, section 3.2. Batch norms are folded and frozen from the first
step, the paper's second phase; the first phase is for training from scratch.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from featherweight.errors import UsageError
from featherweight.shrink.fold import fold_batchnorm, set_module
from featherweight.shrink.quantizers import TINY_STEP

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
CLIPPED = (nn.ReLU, nn.ReLU6)
ACTIVATIONS = (*CLIPPED, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.GELU, nn.PReLU, nn.LeakyReLU)
PASSIVE = (nn.Identity, nn.Dropout, nn.Dropout2d)
POOLS = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
CLIPPED_CALLS = {F.relu, F.relu6, torch.relu, "relu", "relu_", "clamp"}
CALLS = {
    *CLIPPED_CALLS, F.hardswish, F.hardsigmoid, F.silu, F.gelu, F.adaptive_avg_pool2d, F.avg_pool2d,
    torch.sigmoid, torch.cat, torch.add, torch.mul, operator.add, operator.mul, operator.iadd, operator.imul,
    "add", "add_", "mul", "mul_", "sigmoid", "mean",
}  # fmt: skip


class FakeQuantizeWeight(nn.Module):
    """Round a weight as the int8 file will: symmetric, one step per index of `axis`, -top..top."""

    def __init__(self, bits: int = 8, axis: int = 0) -> None:
        super().__init__()
        self.top, self.axis = 2 ** (bits - 1) - 1, axis

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        others = [i for i in range(weight.ndim) if i != self.axis]
        step = (weight.detach().abs().amax(others) / self.top).clamp_min(TINY_STEP)
        zero = torch.zeros_like(step, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, step, zero, self.axis, -self.top, self.top)


class FakeQuantize(nn.Module):
    """Round an activation to affine integers; in training mode the range follows the batches.

    Shapes: any, kept.
    """

    low: torch.Tensor
    high: torch.Tensor
    steps: torch.Tensor

    def __init__(self, bits: int = 8, decay: float = 0.99) -> None:
        super().__init__()
        self.levels, self.decay = 2**bits, decay
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: torch.Tensor) -> None:
        """Move the range towards that of `x`, widened to hold 0."""
        # The first batches count as a plain mean, so the range does not start from nothing.
        share = torch.clamp(1 / (self.steps + 1.0), min=1 - self.decay)
        low, high = torch.aminmax(x.detach().float())
        self.low += share * (low.clamp_max(0) - self.low)
        self.high += share * (high.clamp_min(0) - self.high)
        self.steps += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.observe(x)
        step = ((self.high - self.low) / (self.levels - 1)).clamp_min(TINY_STEP)
        zero = torch.round(-self.low / step).clamp(0, self.levels - 1).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, self.levels - 1)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer that computes with its rounded weight; `layer` keeps the float one."""

    def __init__(self, layer: nn.Module, bits: int = 8) -> None:
        super().__init__()
        self.layer = layer
        self.rounding = FakeQuantizeWeight(bits, axis=1 if isinstance(layer, nn.ConvTranspose2d) else 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounding(self.layer.weight)
        return torch.func.functional_call(self.layer, {"weight": weight}, (x,))


def _is_call(node: fx.Node, modules: dict[str, nn.Module], kinds: tuple[type, ...], calls: set) -> bool:
    """Tell whether `node` calls a module of `kinds` or a function or method in `calls`."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], kinds)
    return node.op in ("call_function", "call_method") and node.target in calls


def _rounds(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Tell whether the int8 file rounds the result of `node`."""
    if node.op == "placeholder":
        return True
    users = list(node.users)
    # The logits stay float, also behind a dropout or a reshape that changes nothing.
    if any(user.op == "output" for user in users):
        return False
    if not _is_call(node, modules, (*LAYERS, *ACTIVATIONS, *POOLS), CALLS):
        return False
    return not (len(users) == 1 and _is_call(users[0], modules, CLIPPED, CLIPPED_CALLS))


def _bypass(graph_model: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Take out what does nothing in eval mode, so that a layer and its ReLU are neighbours."""
    for node in list(graph_model.graph.nodes):
        if _is_call(node, modules, PASSIVE, set()):
            node.replace_all_uses_with(node.args[0])
            graph_model.graph.erase_node(node)
    graph_model.delete_all_unused_submodules()


def prepare_qat(model: nn.Module, bits: int = 8, decay: float = 0.99) -> fx.GraphModule:
    """Return a trainable copy of `model` that rounds like its int8 file; train it, then call `convert_qat`.

    Args:
        model: a trained float network; batch norms are folded in the copy, drop path and dropout left out.
        bits: width of weights and activations.
        decay: how slowly activation ranges follow the batches.

    Raises:
        UsageError: the forward method cannot be traced, because it branches on values.

    >>> qat = prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
    >>> _ = qat.train()(torch.ones(1, 3, 1, 1))
    """
    folded = fold_batchnorm(model)
    try:
        graph_model = fx.symbolic_trace(folded)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be traced for quantisation-aware training ({error}); "
            "remove branches on tensor values, or use post-training quantisation."
        ) from error
    modules = dict(graph_model.named_modules())
    _bypass(graph_model, modules)
    for name, module in modules.items():
        if isinstance(module, LAYERS):
            set_module(graph_model, name, QuantizedLayer(module, bits))
    chosen = [node for node in graph_model.graph.nodes if _rounds(node, modules)]
    for index, node in enumerate(chosen):
        name = f"fake_quantize_{index}"
        graph_model.add_submodule(name, FakeQuantize(bits, decay))
        with graph_model.graph.inserting_after(node):
            rounded = graph_model.graph.call_module(name, (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
    graph_model.recompile()
    graph_model.requires_grad_(True)
    return graph_model


def convert_qat(model: fx.GraphModule) -> fx.GraphModule:
    """Return a float copy of a network from `prepare_qat`, in eval mode, without the simulated quantisers.

    Its weights are the trained float ones; `quantize_onnx` rounds them with the same steps as in training.
    """
    plain = copy.deepcopy(model).eval()
    for node in list(plain.graph.nodes):
        if node.op == "call_module" and isinstance(plain.get_submodule(str(node.target)), FakeQuantize):
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLayer):
            set_module(plain, name, module.layer)
    plain.delete_all_unused_submodules()
    plain.recompile()
    return plain
