"""Blocks as one Triton kernel against the PyTorch blocks: interpreted here, on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from featherweight.errors import UsageError
from featherweight.models.convfirst import ConvFirst, MBConv

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CASES = (
    (ConvFirst, (16, 16), {}, (2, 7, 7)),
    (ConvFirst, (24, 40), {"stride": 2}, (1, 14, 17)),
    (ConvFirst, (20, 20), {"group_width": 1, "kernel_size": 5}, (1, 9, 10)),
    (MBConv, (16, 16), {}, (2, 7, 7)),
    (MBConv, (24, 40), {"stride": 2}, (1, 13, 10)),
    (MBConv, (20, 20), {"group_width": 1, "kernel_size": 5, "expansion": 3}, (1, 9, 10)),
)
"""Class, channels, options, and batch, height and width: border tiles, odd maps, several chunks."""


def folded(kind: type[nn.Module], channels: tuple[int, int], options: dict) -> nn.Module:
    """A block whose norms shift, so that widened values outside the image would show."""
    torch.manual_seed(0)
    block = kind(*channels, **options).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias)
    block.fuse()
    return block


def check(device: str, dtype: torch.dtype = torch.float32, limit: float = 1e-4) -> None:
    from featherweight.blocks.fused_block_triton import run_conv_first, run_mbconv

    for kind, channels, options, (batch, height, width) in CASES:
        block = folded(kind, channels, options).to(device, dtype)
        x = torch.randn(batch, channels[0], height, width).to(device, dtype)
        found = (run_conv_first if kind is ConvFirst else run_mbconv)(block, x)
        with torch.no_grad():
            expected = block.float()(x.float())
        assert found.dtype == dtype and found.shape == expected.shape
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        assert error < limit, (kind.__name__, channels, options, error)


def test_kernels_in_the_interpreter():
    """In a process of its own: triton decides on import whether it interprets."""
    folder = __file__.rpartition("/")[0]
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_fused_block_triton as t; t.check('cpu')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_kernels_on_the_gpu(dtype, limit):
    check("cuda", dtype, limit)


def test_blocks_of_another_form_are_refused():
    from featherweight.blocks.fused_block_triton import run_conv_first, run_mbconv

    x = torch.zeros(1, 16, 8, 8)
    with pytest.raises(UsageError, match="batch norms"):
        run_conv_first(ConvFirst(16, 16).eval(), x)
    with pytest.raises(UsageError, match="batch norms"):
        run_mbconv(MBConv(16, 16).eval(), x)
    with pytest.raises(UsageError, match="does not widen"):
        run_mbconv(folded(MBConv, (16, 16), {"expansion": 1}), x)
    block = folded(ConvFirst, (16, 16), {})
    block.spatial.conv.dilation = (2, 2)
    with pytest.raises(UsageError, match="odd square kernel"):
        run_conv_first(block, x)
