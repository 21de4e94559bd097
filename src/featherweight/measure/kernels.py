"""Cut a network into kernels: what each must compute, read and write, without running it.

Every convolution and matrix product begins a kernel; norms, activations, additions and other work on single
values joins the kernel whose result it takes, if nobody else wants that result, for a good library does it
before it stores. Norms count as folded. What is left, such as pooling and concatenation, is a kernel without
MACs. A block that runs as one kernel counts its input, output and weights once: `fused` names such classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from featherweight.measure.count import macs_of, run_under
from featherweight.measure.roofline import Kernel

Sizes = dict[int, int]
"""Memory of a tensor, by its address, and how many of its values are meant."""


@dataclass
class _Step:
    """One operator: its place in the network, MACs, and the memory that it reads and makes."""

    name: str
    block: str
    macs: int
    is_pointwise: bool
    reads: Sizes
    weights: Sizes
    makes: Sizes


@dataclass
class _Group:
    """Steps that run as one kernel."""

    name: str
    macs: int = 0
    reads: Sizes = field(default_factory=dict)
    weights: Sizes = field(default_factory=dict)
    makes: Sizes = field(default_factory=dict)

    def add(self, step: _Step) -> None:
        """Take a step in; the first one with MACs names the kernel."""
        if step.macs and not self.macs and not step.block:
            self.name = step.name
        self.macs += step.macs
        for mine, new in ((self.reads, step.reads), (self.weights, step.weights), (self.makes, step.makes)):
            mine.update({key: max(size, mine.get(key, 0)) for key, size in new.items()})


class _Recorder(TorchDispatchMode):
    """Records every operator below autograd, with the module that calls it."""

    def __init__(self, model: nn.Module, fused: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.outputs: Sizes = {}
        self.alive: list[Tensor] = []  # two tensors have two addresses only while both live
        self.constants = {_memory(t) for t in (*model.parameters(), *model.buffers())}
        self.scope: list[tuple[str, bool]] = []
        for name, module in model.named_modules():
            entry = (name or type(module).__name__, isinstance(module, fused))
            module.register_forward_pre_hook(lambda *_, entry=entry: self.scope.append(entry))
            module.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.scope.pop()
        if not self.scope:
            self.outputs = _sizes(out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and record it, unless it only looks at memory in another way."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.alive += [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        inputs, makes = _sizes((args, kwargs)), _sizes(out)
        if func._schema.is_mutable or not makes.keys() <= inputs.keys():
            self._record(func, inputs, makes, args, out)
        return out

    def _record(self, func: Any, inputs: Sizes, makes: Sizes, args: Any, out: Any) -> None:
        name = func._schema.name
        is_norm = "batch_norm" in name
        macs = macs_of(name, args, out)
        if name in ("aten::bmm", "aten::baddbmm"):
            macs = out.numel() * args[-1].shape[1]
        self.steps.append(
            _Step(
                name=self.scope[-1][0] if self.scope else name,
                block=next((module for module, is_fused in self.scope if is_fused), ""),
                macs=macs,
                is_pointwise=is_norm or torch.Tag.pointwise in func.tags,
                reads={key: size for key, size in inputs.items() if key not in self.constants},
                weights={k: size for k, size in inputs.items() if k in self.constants and not is_norm},
                makes=makes,
            )
        )


def list_kernels(
    model: nn.Module,
    input_size: tuple[int, ...],
    *,
    batch: int = 1,
    value_bytes: int = 4,
    fused: tuple[type[nn.Module], ...] = (),
) -> list[Kernel]:
    """Return the kernels of a network in eval mode, in the order of execution.

    Products of two activations, as in attention, count here, other than in `measure.count`.

    Args:
        model: the network; it is left as it was.
        input_size: `(C, H, W)`.
        batch: images at once.
        value_bytes: bytes of one value: 4 for float32, 2 for half precision.
        fused: classes of modules each of which runs as one kernel.

    >>> kernel = list_kernels(nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 10, 10), value_bytes=2)[0]
    >>> kernel.macs, kernel.read_bytes, kernel.written_bytes, kernel.weight_bytes
    (7200, 1600, 1600, 160)
    """
    mode = run_under(lambda twin: _Recorder(twin, fused), model, (batch, *input_size))
    groups = _group(mode.steps)
    wanted = Counter(key for group in groups for key in group.reads if key not in group.makes)
    kernels = []
    for group in groups:
        read = sum(size for key, size in group.reads.items() if key not in group.makes)
        written = sum(size for key, size in group.makes.items() if wanted[key] or key in mode.outputs)
        weights = sum(group.weights.values())
        if read or written:
            sizes = (value_bytes * size for size in (read, written, weights))
            kernels.append(Kernel(group.name, group.macs, *sizes))
    return kernels


def _group(steps: list[_Step]) -> list[_Group]:
    readers = Counter(key for step in steps for key in step.reads if key not in step.makes)
    groups: list[_Group] = []
    maker: dict[int, int] = {}
    blocks: dict[str, int] = {}
    for step in steps:
        # A result that somebody else reads must be stored in any case, so joining would save nothing.
        values = max(step.makes.values(), default=0)
        hosts = [
            maker[key]
            for key, size in step.reads.items()
            if key in maker and readers[key] == 1 and size == values
        ]
        in_place = [maker[key] for key in step.reads if key in maker and key in step.makes]
        if step.block in blocks:
            index = blocks[step.block]
        elif step.is_pointwise and not step.block and (hosts or in_place):
            index = max(hosts + in_place)
        else:
            index = len(groups)
            groups.append(_Group(step.block or step.name))
        if step.block:
            blocks[step.block] = index
        groups[index].add(step)
        maker.update(dict.fromkeys(step.makes, index))
    return groups


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _sizes(tree: Any) -> Sizes:
    """Give the memory of the tensors in `tree`; several views add up to no more than what they show."""
    sizes: Sizes = {}
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            held = tensor.untyped_storage().nbytes() // tensor.element_size()
            key = _memory(tensor)
            sizes[key] = min(sizes.get(key, 0) + tensor.numel(), held)
    return sizes
