"""The same checks over every operator that has a card and code, without a line for any single one.

An operator may refuse arguments (a `UsageError` that says which); what it accepts must work.
"""

import ast
import copy
import functools
import inspect
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight.cards import all_cards
from featherweight.errors import UsageError
from featherweight.export.onnx import export_onnx, run_onnx
from featherweight.measure.count import macs_of
from featherweight.registry import get_operators, list_ops

CONVS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@functools.cache
def pairs() -> list:
    """(layer of torch, operator) of every built operator that takes a convolution's place."""
    found = []
    for slug in list_ops():
        try:
            operators = get_operators(slug)
        except UsageError as error:
            assert "replaces no layer" in str(error)
            continue
        found += [(kind, op) for kind, op in operators.items() if kind in CONVS]
    return found


every_op = pytest.mark.parametrize(("conv", "op"), pairs(), ids=lambda value: value.__name__)


def side(dims: int) -> int:
    return {1: 24, 2: 12, 3: 8}[dims]


def images(conv: nn.Module, batch: int = 2, grow: int = 0) -> torch.Tensor:
    dims = CONVS[type(conv)]
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, conv.in_channels, *(side(dims) + grow,) * dims, generator=generator)


def make(conv: nn.Module, op: type, pretrained: bool = True) -> nn.Module:
    """Stand in for `conv`; every parameter at its start is moved, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    own = {"size": tuple(conv(images(conv)).shape[2:])} if op.NEEDS_SIZE else {}
    new = op.from_conv(conv, **own).eval()
    if not pretrained:
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return new


def choices(kind: type) -> list[nn.Module]:
    """Layers of many kinds: what the plain one computes is the yardstick for shapes."""
    dims = CONVS[kind]
    base = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1}
    changes = [
        {},
        {"stride": 2},
        {"bias": False},
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2, "stride": 2},
        {"kernel_size": 2, "padding": 0},
        {"kernel_size": 4, "stride": 2},
        {"padding": 0, "dilation": 2},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4},
        {"padding": "valid", "stride": 2},
        {"padding_mode": "reflect"},
        {"padding_mode": "replicate", "stride": 2},
        {"padding_mode": "circular", "padding": 2, "dilation": 2},
        {"groups": 2},
        {"groups": 4, "stride": 2},
        {"in_channels": 3, "out_channels": 5},
        {"out_channels": 4},
        {"kernel_size": (3, 1, 2)[:dims], "padding": (1, 0, 1)[:dims], "stride": (1, 2, 1)[:dims]},
    ]
    depthwise = {"in_channels": 4, "out_channels": 4, "groups": 4}
    return [kind(**{**base, **extra, **more}) for more in ({}, depthwise) for extra in changes]


def accepted(kind: type, op: type) -> list[tuple[nn.Module, nn.Module]]:
    found = []
    for conv in choices(kind):
        try:
            found.append((conv, make(conv, op, pretrained=False)))
        except UsageError:
            continue
    return found


def typical(kind: type, op: type) -> tuple[nn.Module, nn.Module]:
    """The first layer that the operator takes."""
    return accepted(kind, op)[0]


def relative(a, b) -> float:
    a, b = (np.asarray(t.detach().double()) for t in (a, b))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))


@every_op
def test_signature_begins_as_the_convolutions(conv, op):
    theirs = list(inspect.signature(conv.__init__).parameters.values())[1:]
    ours = inspect.signature(op.__init__).parameters
    names = list(ours)[1:]
    plain = [p for p in theirs if p.name not in ("device", "dtype")]
    assert names[: len(plain)] == [p.name for p in plain]
    assert {"device", "dtype"} <= set(names)
    assert [ours[p.name].default for p in plain] == [p.default for p in plain]
    own = set(names) - {p.name for p in theirs}
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)


@every_op
@torch.no_grad()
def test_output_shape_is_that_of_the_convolution(conv, op):
    found = accepted(conv, op)
    for kind in ("stride", "kernel_size", "padding_mode"):
        assert len({str(getattr(plain, kind)) for plain, _ in found}) > 1, f"{op} refuses every other {kind}"
    for plain, ours in found:
        x = images(plain)
        y = ours(x)
        assert y.shape == plain(x).shape, str(plain)
        assert y.isfinite().all()
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"):
            assert getattr(ours, name) == getattr(plain, name)


@every_op
def test_arguments_out_of_range_are_refused_by_name(conv, op):
    size = {"size": (8,) * CONVS[conv]} if op.NEEDS_SIZE else {}
    base = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, **size}
    for name, value in {"stride": 0, "groups": 3, "padding_mode": "mirror", "kernel_size": 0}.items():
        with pytest.raises(UsageError, match=name):
            op(**{**base, name: value})


@every_op
def test_gradients_are_exact_in_double(conv, op):
    plain, ours = next((p, o) for p, o in accepted(conv, op) if o.has_bias)
    ours = ours.double()
    dims = CONVS[conv]
    extent = ours.size if op.NEEDS_SIZE else (5,) * dims
    x = torch.randn(2, plain.in_channels, *extent, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in ours.parameters() if p.requires_grad]
    fast = {"fast_mode": True, "atol": 1e-6}
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *parameters), **fast)


@every_op
def test_every_parameter_gets_a_gradient(conv, op):
    plain, ours = typical(conv, op)
    ours.train()(images(plain, 4)).square().sum().backward()
    assert not [k for k, p in ours.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@every_op
@torch.no_grad()
def test_a_samples_answer_depends_on_itself_alone(conv, op):
    for plain, ours in accepted(conv, op)[:3]:
        x = images(plain, 3)
        together = ours(x)
        assert relative(ours(x[1:2]), together[1:2]) < 1e-5
        assert relative(ours(x.flip(0)), together.flip(0)) < 1e-5


@every_op
@torch.no_grad()
def test_memory_layout_does_not_matter(conv, op):
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if CONVS[conv] not in formats:
        pytest.skip("PyTorch has no channels-last layout for this number of axes")
    plain, ours = typical(conv, op)
    x = images(plain)
    turned = copy.deepcopy(ours).to(memory_format=formats[CONVS[conv]])
    assert relative(turned(x.to(memory_format=formats[CONVS[conv]])), ours(x)) < 1e-5


@every_op
@torch.no_grad()
def test_bfloat16(conv, op):
    plain, ours = typical(conv, op)
    y = copy.deepcopy(ours).bfloat16()(images(plain).bfloat16())
    assert y.dtype == torch.bfloat16 and relative(y.float(), ours(images(plain))) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(ours(images(plain)).float(), ours(images(plain))) < 0.1


@every_op
@torch.no_grad()
def test_copies_and_files_give_the_same(conv, op, tmp_path):
    plain, ours = typical(conv, op)
    x = images(plain)
    expected = ours(x)
    assert torch.equal(copy.deepcopy(ours)(x), expected)
    save_file({k: v.contiguous() for k, v in ours.state_dict().items()}, tmp_path / "w.safetensors")
    twin = make(plain, op)
    twin.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(twin(x), expected)


@every_op
@torch.no_grad()
def test_double_and_meta_devices(conv, op):
    plain, ours = typical(conv, op)
    wide = copy.deepcopy(ours).double()
    assert relative(wide(images(plain).double()), ours(images(plain))) < 1e-4
    assert copy.deepcopy(ours).to("meta")(images(plain).to("meta")).shape == plain(images(plain)).shape


@every_op
@torch.no_grad()
def test_torch_export_with_dynamic_batch(conv, op):
    plain, ours = typical(conv, op)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(ours, (images(plain),), dynamic_shapes=(batch,))
    assert relative(program.module()(images(plain, 5)), ours(images(plain, 5))) < 1e-4


class Pooled(nn.Module):
    """The operator as a network that gives a vector."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x).flatten(1)


@every_op
@torch.no_grad()
def test_onnx_parity_with_dynamic_batch(conv, op, tmp_path):
    plain, ours = typical(conv, op)
    x = images(plain, 3)
    export_onnx(Pooled(ours), tmp_path / "m.onnx", tuple(x.shape[1:]), exporter="traced")
    for part in (x, x[:1]):
        found = torch.from_numpy(run_onnx(tmp_path / "m.onnx", part.numpy()))
        assert relative(found, Pooled(ours)(part)) < 1e-4


@every_op
@torch.no_grad()
def test_mac_formula_holds_what_runs(conv, op):
    """What runs as convolutions and products is in the formula; work that runs otherwise may add to it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Executed(TorchDispatchMode):
        macs = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.macs += macs_of(func._schema.name, args, out)
            return out

    for plain, ours in accepted(conv, op):
        x = images(plain, 1)
        ours(x)  # what is prepared once and kept is no cost of an image
        with Executed() as mode:
            ours(x)
        formula = ours.macs(tuple(x.shape[1:]))
        places = math.prod(plain(x).shape)
        least = places * plain.in_channels // plain.groups * math.prod(plain.kernel_size)
        assert formula >= mode.macs, str(plain)
        assert formula in (mode.macs, least), f"{plain}: formula {formula}, ran {mode.macs}, plain {least}"


@pytest.mark.parametrize("slug", list_ops())
def test_docstring_sections_and_figure(slug):
    text = ast.get_docstring(ast.parse(all_cards()[slug].module_path.read_text(encoding="utf-8"))) or ""
    assert "\nShapes:\n" in text and "\nDiffers:\n" in text, f"{slug}: Shapes and Differs are missing"
    assert any(mark in text for mark in "─►│┌*"), f"{slug}: no figure of what it computes"
