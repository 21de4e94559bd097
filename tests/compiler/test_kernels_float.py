"""The float32 convolution kernels, compiled alone and held against numpy in float64."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from float_kernels import UNTOUCHED, build, call, noise, to_pixel

from featherweight.compiler import pack

__all__ = ["build"]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def direct(x, weight, bias, stride, dilation, groups, padding):
    """Return the convolution in float64, tap by tap."""
    x = np.pad(x.astype(float), ((0, 0), (0, 0), *padding))
    outputs, narrow, height, width = weight.shape
    rows = (x.shape[2] - (height - 1) * dilation[0] - 1) // stride[0] + 1
    columns = (x.shape[3] - (width - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((len(x), outputs, rows, columns)) + bias.astype(float)[:, None, None]
    for o in range(outputs):
        first = o // (outputs // groups) * narrow
        for ty in range(height):
            for tx in range(width):
                top, left = ty * dilation[0], tx * dilation[1]
                part = x[
                    :,
                    first : first + narrow,
                    top : top + (rows - 1) * stride[0] + 1 : stride[0],
                    left : left + (columns - 1) * stride[1] + 1 : stride[1],
                ]
                y[:, o] += np.einsum("nchw,c->nhw", part, weight[o, :, ty, tx].astype(float))
    return y


@dataclass(frozen=True)
class Conv:
    """One convolution and the tile that computes it."""

    images: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: tuple = ((0, 0), (0, 0))
    tile: tuple[int, int] = (4, 2)
    blocks: tuple[int, int, int] = (2, 8, 1)
    epilogue: str = "NONE"

    def output_size(self):
        return tuple(
            (self.size[i] + sum(self.padding[i]) - (self.kernel[i] - 1) * self.dilation[i] - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )


CONVS = (
    Conv(1, 24, 40, (1, 49), tile=(7, 2), blocks=(1, 14, 2)),
    Conv(2, 5, 33, (3, 9), tile=(8, 3), blocks=(1, 16, 1), epilogue="ADD_RELU"),
    Conv(1, 40, 70, (1, 3), tile=(1, 8), blocks=(1, 1, 1), epilogue="RELU"),
    Conv(1, 16, 96, (1, 31), tile=(14, 2), blocks=(1, 14, 9)),
    Conv(1, 3, 20, (11, 13), (3, 3), (2, 2), padding=((1, 1), (1, 1)), tile=(6, 2), epilogue="RELU"),
    Conv(2, 18, 17, (7, 9), (3, 2), dilation=(2, 3), padding=((2, 1), (0, 3)), tile=(5, 1), epilogue="ADD"),
    Conv(1, 24, 24, (6, 8), (3, 3), groups=3, padding=((1, 1), (1, 1)), tile=(4, 1)),
    Conv(1, 32, 32, (6, 8), (3, 3), groups=16, padding=((1, 1), (1, 1)), tile=(8, 1)),
    Conv(1, 12, 36, (5, 5), (1, 3), groups=12, padding=((0, 0), (1, 1)), tile=(5, 2)),
    Conv(1, 96, 64, (4, 4), groups=2, tile=(4, 2)),
)


def conv_source(case, index):
    """Return the definition and the call of one case; `cs`(channels) are floats of a pixel."""
    rows, columns = case.output_size()
    height, width = (case.size[i] + sum(case.padding[i]) for i in (0, 1))
    x, y = f"FW_CS({case.inputs})", f"FW_CS({case.outputs})"
    vectors = f"FW_VECTORS({case.outputs})"
    residual = int("ADD" in case.epilogue)
    fields = [
        *(case.images, rows, columns, *case.kernel, "depth", vectors, "VL", *case.blocks),
        *(f"{height * width} * {x}", f"{case.stride[0] * width} * {x}", f"{case.stride[1]} * {x}"),
        *(f"{case.dilation[0] * width} * {x}", f"{case.dilation[1]} * {x}"),
        *(f"{rows * columns} * {y}", f"{columns} * {y}", y) * 2,
        "first",
    ]
    mr, nr = case.tile
    return f"""
FW_DEFINE_CONV(conv{index}, {mr}, {nr}, FW_TAIL({vectors}, {nr}), FW_EPILOGUE_{case.epilogue}, {residual})
void run{index}(ARRAYS, int depth, const int *first, int threads);
void run{index}(ARRAYS, int depth, const int *first, int threads) {{
    const fw_conv shape = {{{", ".join(map(str, fields))}}};
    for (int t = 0; t < threads; t++) conv{index}(&shape, x, w, b, NULL, r, y, t, threads);
}}
"""


CONV_HEAD = """
#include "conv.h"
#define FW_VECTORS(channels) (((channels) + VL - 1) / VL)
#define ARRAYS const float *x, const float *w, const float *b, const float *r, float *y
#define FW_CS(channels) (FW_VECTORS(channels) * VL)
#define FW_TAIL(vectors, nr) ((vectors) % (nr) ? (vectors) % (nr) : (nr))
"""


@pytest.fixture(scope="module")
def convs(build):
    return build(CONV_HEAD + "".join(conv_source(case, index) for index, case in enumerate(CONVS)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", range(len(CONVS)))
def test_convolution(convs, index, threads):
    """Dense, grouped, strided, dilated: all tails; in place where there is a residual."""
    case, lanes = CONVS[index], convs.lanes()
    x = noise(case.images, case.inputs, *case.size)
    weight = noise(case.outputs, case.inputs // case.groups, *case.kernel)
    bias = noise(case.outputs)
    grouping = pack.conv_groups(case.outputs, case.inputs, case.groups, lanes, case.tile[1])
    first = np.array(grouping.first, np.int32) if grouping.first else None
    expected = direct(x, weight, bias, case.stride, case.dilation, case.groups, case.padding)
    residual = noise(*expected.shape)
    y = np.nan_to_num(to_pixel(residual, lanes))
    packed = pack.conv_weights(weight, lanes, case.tile[1], case.groups)
    call(
        getattr(convs, f"run{index}"),
        *(to_pixel(x, lanes, case.padding), packed, pack.pad_channels(bias, lanes), y, y, grouping.depth),
        *(first, threads),
    )
    if "ADD" in case.epilogue:
        expected = expected + residual
    if "RELU" in case.epilogue:
        expected = np.maximum(expected, 0)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, : case.outputs], expected, rtol=2e-5, atol=2e-4)
    assert np.isfinite(y).all()


def test_convolution_into_a_concatenation(build):
    """A part of 5 channels behind 3 others: nothing but its own lanes changes."""
    source = """
FW_DEFINE_CONV(part, 3, 1, 1, FW_EPILOGUE_NONE, 0)
void run(const float *x, const float *w, const float *b, float *y);
void run(const float *x, const float *w, const float *b, float *y) {
    const fw_conv shape = {1, 1, 7, 1, 1, 2, FW_VECTORS(5), 5 - (FW_VECTORS(5) - 1) * VL, 1, 7, 99,
                           0, 0, 2, 0, 0, 0, 0, 8, 0, 0, 0, NULL};
    part(&shape, x, w, b, NULL, NULL, y + 3, 0, 1);
}
"""
    library = build(CONV_HEAD + source)
    x, weight, y = noise(7, 2), noise(5, 2), np.full((7, 8), UNTOUCHED, np.float32)
    packed = pack.conv_weights(weight[:, :, None, None], library.lanes(), 1)
    call(library.run, x, packed, pack.pad_channels(np.ones(5), library.lanes()), y)
    np.testing.assert_allclose(y[:, 3:], x @ weight.T + 1, rtol=1e-5, atol=1e-5)
    assert (y[:, :3] == UNTOUCHED).all()


@dataclass(frozen=True)
class Depthwise:
    """One depthwise convolution."""

    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple = ((1, 1), (1, 1))
    images: int = 1
    most: int = 8
    residual: int = 0


DEPTHWISE = (
    Depthwise(24, (9, 14), (3, 3), images=2, most=7),
    Depthwise(40, (7, 7), (5, 5), padding=((2, 2), (2, 2)), residual=1),
    Depthwise(16, (12, 15), (3, 3), (2, 2), padding=((0, 1), (0, 1))),
    Depthwise(17, (8, 20), (3, 3), (2, 2), most=5),
    Depthwise(8, (9, 17), (7, 7), padding=((3, 3), (3, 3)), most=4),
    Depthwise(5, (6, 30), (1, 11), padding=((0, 0), (5, 5)), residual=1),
    Depthwise(5, (30, 3), (11, 1), padding=((5, 5), (0, 0))),
    Depthwise(20, (9, 11), (3, 5), (1, 2), (3, 2), padding=((3, 3), (4, 4)), images=3),
    Depthwise(4, (2, 3), (3, 3), padding=((4, 4), (5, 5))),
    Depthwise(6, (4, 33), (3, 31), padding=((1, 1), (15, 15))),
)


def depthwise_source(case, index):
    height, width = case.size
    rows, columns = depthwise_size(case)
    spans = pack.depthwise_spans(
        columns, width, case.kernel[1], case.stride[1], case.dilation[1], case.padding[1][0], case.most
    )
    tiles = {(s.outputs, s.low, s.high): f"tile{index}_{s.outputs}_{n}" for n, s in enumerate(spans)}
    epilogue = "ADD_RELU" if case.residual else "RELU"
    parts = [
        f"FW_DEFINE_DEPTHWISE_TILE({name}, {case.kernel[1]}, {case.stride[1]}, {case.dilation[1]}, "
        f"{r}, {low}, {high}, FW_EPILOGUE_{epilogue}, {case.residual})"
        for (r, low, high), name in tiles.items()
    ]
    table = ", ".join(
        f"{{{tiles[s.outputs, s.low, s.high]}, {s.count}, {s.column}, {s.columns}, "
        f"{s.in_column}, {s.in_columns}}}"
        for s in spans
    )
    cs = f"FW_CS({case.channels})"
    fields = [
        *(case.images, rows, height, *case.kernel, case.stride[0], case.dilation[0], case.padding[0][0]),
        *(f"FW_VECTORS({case.channels})", "VL", f"{height * width} * {cs}", f"{width} * {cs}", cs),
        *(f"{rows * columns} * {cs}", f"{columns} * {cs}", cs) * 2,
    ]
    parts.append(f"""
static const fw_depthwise_span spans{index}[] = {{{table}}};
void run{index}(ARRAYS, int threads);
void run{index}(ARRAYS, int threads) {{
    const fw_depthwise shape = {{{", ".join(map(str, fields))}}};
    for (int t = 0; t < threads; t++)
        fw_depthwise_run(&shape, spans{index}, {len(spans)}, x, w, b, NULL, r, y, t, threads);
}}
""")
    return "\n".join(parts)


def depthwise_size(case):
    return tuple(
        (case.size[i] + sum(case.padding[i]) - (case.kernel[i] - 1) * case.dilation[i] - 1) // case.stride[i]
        + 1
        for i in (0, 1)
    )


@pytest.fixture(scope="module")
def depthwises(build):
    head = CONV_HEAD.replace("conv.h", "depthwise.h")
    return build(head + "".join(depthwise_source(case, index) for index, case in enumerate(DEPTHWISE)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("index", range(len(DEPTHWISE)))
def test_depthwise(depthwises, index, threads):
    """Borders of every kind: wider than a tile, than the map, asymmetric; strides, dilations; in place."""
    case, lanes = DEPTHWISE[index], depthwises.lanes()
    x = noise(case.images, case.channels, *case.size)
    weight, bias = noise(case.channels, 1, *case.kernel), noise(case.channels)
    expected = direct(x, weight, bias, case.stride, case.dilation, case.channels, case.padding)
    residual = noise(*expected.shape) * case.residual
    y = np.nan_to_num(to_pixel(residual, lanes))
    source = np.nan_to_num(to_pixel(x, lanes))
    packed = pack.depthwise_weights(weight, lanes)
    call(getattr(depthwises, f"run{index}"), source, packed, pack.pad_channels(bias, lanes), y, y, threads)
    expected = np.maximum(expected + residual, 0)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, : case.channels], expected, rtol=2e-5, atol=1e-4)
    assert np.isfinite(y).all()


@pytest.mark.slow
def test_under_the_address_sanitizer():
    """This file again, with every access of the native build checked."""
    sanitizer = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    path = Path(sanitizer.stdout.strip())
    if not path.is_absolute():
        pytest.skip("no AddressSanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(path),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FEATHERWEIGHT_TEST_CFLAGS": "-fsanitize=address -g",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "native and not sanitizer", __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
