"""What each operator of a network costs, by the formula that the operator itself gives.

`macs` follows the convention of `measure.count`: convolutions, linear layers and what takes their place.
Fourier transforms stand apart, because papers differ on whether they count: a real transform of P points is
taken as 2.5 P log2 P additions and multiplications, 1.25 P log2 P MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from featherweight.measure.count import run_under


@dataclass(frozen=True)
class OperatorCost:
    """One operator of a network, for one image.

    Args:
        name: dotted name of the layer.
        operator: its class.
        params: values that it holds.
        macs: multiply-adds of convolutions and products with weights.
        transform_macs: multiply-adds of Fourier transforms, counted apart.
    """

    name: str
    operator: str
    params: int
    macs: int
    transform_macs: int


def operator_costs(model: nn.Module, input_size: Sequence[int]) -> list[OperatorCost]:
    """Return the cost of every operator in `model`, in the order of execution.

    Args:
        model: the network; it is left as it was.
        input_size: `(C, H, W)`.

    >>> from featherweight.blocks.conv_operator import ConvOperator
    >>> class Plain(ConvOperator):
    ...     def forward(self, x):
    ...         return x.new_zeros(len(x), 8, 10, 10)
    >>> operator_costs(Plain(3, 8, 3, padding=1), (3, 10, 10))[0].macs
    21600
    """
    costs: list[OperatorCost] = []

    def watch(twin: nn.Module) -> Any:
        for name, module in twin.named_modules():
            if callable(getattr(module, "macs", None)):
                module.register_forward_hook(_note(name, costs))
        costs.clear()  # the network may run a second time where it cannot run without values
        return torch.no_grad()

    run_under(watch, model, (1, *input_size))
    return costs


def _note(name: str, costs: list[OperatorCost]) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        shape, batch = tuple(args[0].shape[1:]), len(args[0])
        transforms = getattr(module, "transform_macs", None)
        costs.append(
            OperatorCost(
                name,
                type(module).__name__,
                sum(p.numel() for p in module.parameters()),
                batch * module.macs(shape),
                batch * transforms(shape) if transforms else 0,
            )
        )

    return hook
