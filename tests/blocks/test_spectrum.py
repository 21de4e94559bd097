"""Spectra: the fast and the captured form agree with each other and with a naive transform."""

import pytest
import torch

from featherweight.blocks import spectrum
from featherweight.blocks.spectrum import mix_channels, multiply, to_image, to_spectrum

SIZES = [(1, 1), (1, 2), (2, 3), (5, 4), (4, 7), (6, 6)]


@pytest.fixture(params=["fast", "captured"])
def form(request, monkeypatch):
    """Run a test eagerly and as if a graph were being captured."""
    if request.param == "captured":
        monkeypatch.setattr(spectrum, "_capturing", lambda: True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_complex(z: torch.Tensor) -> torch.Tensor:
    return torch.complex(*z.unbind(2))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_transform_is_the_sum_of_its_definition_and_comes_back(height, width):
    x = random(2, 3, height, width)
    u, v, i, j = (torch.arange(n).double() for n in (height, width // 2 + 1, height, width))
    angle = u[:, None, None, None] * i[:, None] / height + v[:, None, None] * j / width
    naive = torch.einsum("ncij,uvij->ncuv", x + 0j, torch.exp(-2j * torch.pi * angle))
    z = to_spectrum(x)
    torch.testing.assert_close(as_complex(z), naive / (height * width) ** 0.5, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_image(z, x), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_both_forms_agree_on_spectra_of_no_real_map(height, width, monkeypatch):
    x, z = random(2, 16, height, width), random(2, 16, 2, height, width // 2 + 1)
    weight, bias = random(2, 4, 4, 4), random(2, 4, 4)
    calls = (
        lambda: to_spectrum(x),
        lambda: to_image(z, x),
        lambda: multiply(z, to_spectrum(x)),
        lambda: mix_channels(z, weight, bias),
    )
    fast = [call() for call in calls]
    monkeypatch.setattr(spectrum, "_capturing", lambda: True)
    for call, expected in zip(calls, fast, strict=True):
        torch.testing.assert_close(call(), expected, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("form")
def test_mixing_is_a_complex_product_inside_each_group():
    z, weight, bias = random(1, 6, 2, 3, 2), random(2, 2, 3, 3), random(2, 2, 3)
    w, b = torch.complex(*weight), torch.complex(*bias)
    groups = as_complex(z)[0].unflatten(0, (2, 3))
    naive = torch.einsum("gio,gihf->gohf", w, groups) + b[..., None, None]
    torch.testing.assert_close(as_complex(mix_channels(z, weight, bias))[0], naive.flatten(0, 1))


@pytest.mark.usefixtures("form")
def test_gradients():
    inputs = [random(1, 4, 3, 4), random(2, 2, 2, 2, seed=1), random(2, 2, 2, seed=2)]

    def run(x, weight, bias):
        z = to_spectrum(x)
        return to_image(multiply(mix_channels(z, weight, bias), z), x)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs])


def test_fast_form_copies_no_spectrum():
    z = to_spectrum(torch.randn(2, 3, 8, 8))
    assert spectrum._as_complex(z).data_ptr() == z.data_ptr()
    assert spectrum._as_complex(torch.nn.functional.silu(z)).is_complex()
    assert torch.nn.functional.silu(z).permute(0, 1, 3, 4, 2).is_contiguous()


@pytest.mark.usefixtures("form")
def test_half_precision_is_transformed_in_single():
    x = torch.randn(1, 2, 4, 4).bfloat16()
    z = to_spectrum(x)
    assert z.dtype == torch.float32 and to_image(z, x).dtype == torch.bfloat16


@pytest.mark.usefixtures("form")
def test_autocast_changes_nothing():
    x, weight, bias = (random(*shape).float() for shape in ((1, 4, 5, 6), (2, 2, 2, 2), (2, 2, 2)))

    def run():
        z = to_spectrum(x)
        return to_image(multiply(mix_channels(z, weight, bias), z), x)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), expected)
