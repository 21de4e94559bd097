"""Replacing convolutions: what is chosen, what is kept, what is refused, over networks of three libraries."""

import copy

import pytest
import torch
from torch import nn

import featherweight
from featherweight.blocks.conv_operator import ConvOperator, copy_parameter
from featherweight.errors import UsageError
from featherweight.ops.replace import replace_convs


class Same2d(ConvOperator):
    """A convolution under another name; refuses dilation."""

    def __init__(self, *args, scale=1.0, device=None, dtype=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.dilation != (1, 1):
            raise UsageError(f"Got dilation={self.dilation}; Same2d needs 1.")
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        self.kernel = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.shift = (
            nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if self.has_bias else None
        )
        self.scale = scale

    @classmethod
    def from_conv(cls, conv, **kwargs):
        new = super().from_conv(conv, **kwargs)
        copy_parameter(new.kernel, conv.weight)
        if conv.bias is not None:
            copy_parameter(new.shift, conv.bias)
        return new

    def forward(self, x):
        return self.scale * self.convolve(x, self.kernel, self.shift)


class Sized2d(Same2d):
    """Wants its output size."""

    NEEDS_SIZE = True

    def __init__(self, *args, size, **kwargs):
        super().__init__(*args, **kwargs)
        self.size = tuple(size)

    def forward(self, x):
        y = super().forward(x)
        assert y.shape[2:] == self.size
        return y


def found(model, kind=Same2d):
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 4, 3),
    )


def networks():
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    yield torchvision.models.resnet18(num_classes=5)
    yield torchvision.models.mobilenet_v3_small(num_classes=5)
    yield torchvision.models.convnext_tiny(num_classes=5).features[:3]
    yield timm.create_model("convnext_atto", num_classes=5)
    yield featherweight.create_model("mobilenetv2_100", width=0.25, num_classes=5)
    yield featherweight.create_model("simplenet_cifar_310k")


@torch.no_grad()
def test_networks_of_three_libraries_answer_as_before():
    x = torch.randn(2, 3, 64, 64)
    for model in networks():
        model.eval()
        expected = model(x)
        convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert replace_convs(model, Same2d, where="*") is model
        assert found(model) == convs and not found(model, nn.Conv2d)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_where_chooses():
    assert found(replace_convs(small(), Same2d)) == ["0", "4"]  # the base class suits all but 1x1 kernels
    assert found(replace_convs(small(), Same2d, where="3")) == ["3"]
    assert found(replace_convs(small(), Same2d, where=["0", "[3-9]"])) == ["0", "3", "4"]
    assert found(replace_convs(small(), Same2d, where=lambda n, m: m.bias is None)) == ["0"]
    model = small()
    replaced = replace_convs(copy.deepcopy(model), Same2d)
    assert found(replaced) and not found(model)
    assert isinstance(replace_convs(nn.Conv2d(2, 2, 3), Same2d), Same2d)


def test_hooks_mode_dtype_and_frozen_weights_are_kept():
    model = small().to(torch.float64)
    model[0].weight.requires_grad_(False)
    model[4].eval()
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    replace_convs(model, Same2d, scale=2.0)
    assert model[0].training and not model[4].training and model[4].scale == 2.0
    assert model[0].kernel.dtype == torch.float64 and not model[0].kernel.requires_grad
    assert model[4].kernel.requires_grad
    model(torch.randn(2, 3, 9, 9, dtype=torch.float64))
    assert calls == ["before", "after"]
    handle.remove()
    model(torch.randn(2, 3, 9, 9, dtype=torch.float64))
    assert calls == ["before", "after", "before"]


def test_a_shared_layer_is_replaced_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": nn.Sequential(conv, nn.ReLU()), "b": nn.Sequential(conv, conv)})
    replace_convs(model, Same2d)
    assert isinstance(model["a"][0], Same2d)
    assert model["a"][0] is model["b"][0] is model["b"][1]


def test_sizes_are_found_by_one_run():
    model = small().train()
    replace_convs(model, Sized2d, where="*", input_size=(3, 17, 21))
    assert [model[i].size for i in (0, 3, 4)] == [(9, 11), (9, 11), (7, 9)]
    assert model.training and model(torch.randn(2, 3, 17, 21)).shape == (2, 4, 7, 9)
    assert model[1].num_batches_tracked == 1
    with pytest.raises(UsageError, match="input_size"):
        replace_convs(small(), Sized2d)
    conv = nn.Conv2d(4, 4, 3)
    with pytest.raises(UsageError, match="one output size"):
        replace_convs(nn.Sequential(conv, conv), Sized2d, input_size=(4, 9, 9))


def test_refusals_name_the_layer_and_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dilation=2))
    with pytest.raises(UsageError, match=r"Layer '1' .*dilation"):
        replace_convs(model, Same2d)
    assert not found(model)
    assert found(replace_convs(model, Same2d, where="0")) == ["0"]
    with pytest.raises(UsageError, match="No layer"):
        replace_convs(small(), Same2d, where="conv*")
    with pytest.raises(UsageError, match="Did you mean fdconv"):
        replace_convs(small(), "fdconvs")
    with pytest.raises(UsageError, match="from_conv"):
        replace_convs(small(), nn.Identity)

    class Padded(nn.Conv2d):
        """Computes something else than its class says."""

    model = nn.Sequential(Padded(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert found(replace_convs(copy.deepcopy(model), Same2d)) == ["1"]
    with pytest.raises(UsageError, match=r"Layer '0'.*Padded"):
        replace_convs(model, Same2d, where="*")


def test_computed_and_tied_weights_are_refused():
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(UsageError, match="computes its weight"):
        replace_convs(nn.Sequential(normed), Same2d, where="*")
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match="shares its parameters"):
        replace_convs(tied, Same2d)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"stride": 0}, "stride"),
        ({"padding": "half"}, "padding"),
        ({"padding": "same", "stride": 2}, "same"),
        ({"groups": 3}, "groups"),
        ({"padding_mode": "mirror"}, "padding_mode"),
    ],
)
def test_arguments_are_checked(kwargs, word):
    with pytest.raises(UsageError, match=word):
        ConvOperator(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **kwargs})


def test_output_size_is_that_of_the_convolution():
    for kernel, stride, padding, dilation in [
        (3, 2, 1, 1),
        ((2, 5), (1, 3), (0, 2), (2, 1)),
        (4, 1, "same", 2),
    ]:
        ours = ConvOperator(1, 1, kernel, stride, padding, dilation)
        theirs = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
        assert ours.output_size((17, 20)) == theirs(torch.zeros(1, 1, 17, 20)).shape[2:]
    with pytest.raises(UsageError, match="smaller than the kernel"):
        ConvOperator(1, 1, 5).output_size((4, 9))
