"""The inverse transform by small products equals the library's, whatever the spectrum."""

import pytest
import torch

from featherweight.blocks import split_fourier
from featherweight.blocks.split_fourier import inverse_real


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 13), (12, 9), (48, 64), (3, 31), (192, 96)])
def test_products_equal_the_transform(shape, monkeypatch):
    rows, columns = shape
    z = torch.randn(2, rows, columns // 2 + 1, 2, dtype=torch.float64)
    expected = torch.fft.irfft2(torch.view_as_complex(z), s=shape)
    assert torch.allclose(inverse_real(z, rows, columns), expected, atol=1e-12)
    monkeypatch.setattr(split_fourier.torch.jit, "is_tracing", lambda: True)
    assert torch.allclose(inverse_real(z, rows, columns), expected, atol=1e-12)
