"""Fused blocks against the same layers in float64, for strips of every kind."""

import shutil

import numpy as np
import pytest
from float_kernels import build, call, noise, to_pixel
from test_kernels_float import CONV_HEAD, direct

from featherweight.compiler import pack

__all__ = ["build"]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

# inputs, expanded, outputs, height, width, kernel, stride, rows of a strip, what it starts and ends with
BLOCKS = (
    (5, 20, 5, 9, 8, 3, 1, 2, "expand project residual"),
    (5, 20, 7, 9, 8, 3, 1, 20, "expand project"),
    (6, 33, 4, 11, 9, 5, 2, 3, "expand project"),
    (6, 18, 18, 8, 12, 3, 2, 1, "expand"),
    (12, 12, 12, 7, 7, 3, 1, 3, "project residual"),
)


def source(block, index):
    inputs, middle, outputs, height, width, kernel, stride, strip, parts = block
    pad = kernel // 2
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    spans = pack.depthwise_spans(columns, width, kernel, stride, 1, pad, 6)
    text, table = "", []
    for n, s in enumerate(spans):
        name = f"tile{index}_{n}"
        text += f"FW_DEFINE_DEPTHWISE_TILE({name}, {kernel}, {stride}, 1, {s.outputs}, {s.low}, {s.high}, "
        text += "FW_EPILOGUE_RELU, 0)\n"
        table.append(f"{{{name}, {s.count}, {s.column}, {s.columns}, {s.in_column}, {s.in_columns}}}")
    x, m, y = (f"FW_CS({channels})" for channels in (inputs, middle, outputs))
    residual = int("residual" in parts)
    last = "ADD" if residual else "NONE"
    vectors = [f"FW_VECTORS({channels})" for channels in (middle, outputs)]
    first, end = (f"&{part}" if part in parts else "NULL" for part in ("expand", "project"))
    return f"""{text}
FW_DEFINE_CONV(expand{index}, 4, 2, FW_TAIL({vectors[0]}, 2), FW_EPILOGUE_RELU, 0)
FW_DEFINE_CONV(project{index}, 3, 1, 1, FW_EPILOGUE_{last}, {residual})
static const fw_depthwise_span spans{index}[] = {{{", ".join(table)}}};
int run{index}(const float *const *p, float *y, float *scratch, int threads);
int run{index}(const float *const *p, float *y, float *scratch, int threads) {{
    const fw_conv expand = {{
        .columns = {width}, .tap_rows = 1, .tap_columns = 1, .depth = {inputs}, .vectors = {vectors[0]},
        .lanes = VL, .block_groups = 2, .x_image = {height * width} * {x}, .x_column = {x}, .y_column = {m}}};
    const fw_conv project = {{
        .columns = {columns}, .tap_rows = 1, .tap_columns = 1, .depth = {middle}, .vectors = {vectors[1]},
        .lanes = VL, .block_groups = 2, .x_column = {m}, .y_image = {rows * columns} * {y}, .y_column = {y},
        .r_image = {rows * columns} * {y}, .r_column = {y}}};
    const fw_depthwise depthwise = {{
        2, {rows}, {height}, {kernel}, {kernel}, {stride}, 1, {pad}, {vectors[0]}, VL,
        {height * width} * {m}, {width} * {m}, {m}, {rows * columns} * {m}, {columns} * {m}, {m}, 0, 0, 0}};
    const fw_block block = {{
        {first}, {end}, expand{index}, project{index}, &depthwise, spans{index}, {len(spans)}, {strip}, 8}};
    const fw_block_data data = {{
        p[0], {"p[0]" if residual else "NULL"}, y, p[1], p[2], NULL, p[3], p[4], NULL, p[5], p[6], NULL}};
    (void)expand, (void)project;
    for (int t = 0; t < threads; t++) fw_inverted(&block, &data, scratch, t, threads);
    return (int)fw_block_floats(&block);
}}
"""


@pytest.fixture(scope="module")
def blocks(build):
    head = CONV_HEAD.replace("conv.h", "fused.h")
    return build(head + "".join(source(block, index) for index, block in enumerate(BLOCKS)))


def layer(x, weight, bias, stride, groups, relu):
    pad = weight.shape[2] // 2
    y = direct(x, weight, bias, (stride, stride), (1, 1), groups, ((pad, pad), (pad, pad)))
    return np.maximum(y, 0) if relu else y


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_inverted_residual(blocks, index, threads):
    """Two images, shifts that make a border of relu(bias) wrong, scratch not a float larger than stated."""
    inputs, middle, outputs, height, width, kernel, stride, _, parts = BLOCKS[index]
    lanes = blocks.lanes()
    x = noise(2, inputs, height, width)
    weights = [noise(middle, inputs, 1, 1), noise(middle, 1, kernel, kernel), noise(outputs, middle, 1, 1)]
    biases = [noise(middle) + 1, noise(middle), noise(outputs)]
    expected = layer(x, weights[0], biases[0], 1, 1, True) if "expand" in parts else x
    expected = layer(expected, weights[1], biases[1], stride, middle, True)
    if "project" in parts:
        expected = layer(expected, weights[2], biases[2], 1, 1, False)
    if "residual" in parts:
        expected = expected + x
    pixels = np.nan_to_num(to_pixel(x, lanes))
    packed = [
        *(pack.conv_weights(weights[0], lanes, 2), pack.pad_channels(biases[0], lanes)),
        *(pack.depthwise_weights(weights[1], lanes), pack.pad_channels(biases[1], lanes)),
        *(pack.conv_weights(weights[2], lanes, 1), pack.pad_channels(biases[2], lanes)),
    ]
    channels = expected.shape[1]
    y = np.full((2, *expected.shape[2:], -(-channels // lanes) * lanes), np.nan, np.float32)
    pointers = np.array([a.ctypes.data for a in (pixels, *packed)], np.uintp)
    run = getattr(blocks, f"run{index}")
    guard = np.full(1 << 16, 9.0, np.float32)
    floats = call(run, pointers, y, guard, threads)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, :channels], expected, rtol=1e-4, atol=1e-3)
    assert (guard[floats * threads :] == 9).all()


CHAIN = """
FW_DEFINE_CONV(first, 2, 2, FW_TAIL(FW_VECTORS(40), 2), FW_EPILOGUE_RELU, 0)
FW_DEFINE_CONV(second, 2, 1, 1, FW_EPILOGUE_ADD, 1)
void run(const float *const *p, float *y, float *scratch, int threads);
void run(const float *const *p, float *y, float *scratch, int threads) {
    const fw_conv expand = {1, 1, 50, 1, 1, 10, FW_VECTORS(40), VL, 1, 0, 9, 0, 0, FW_CS(10), 0, 0,
                            0, 0, FW_CS(40), 0, 0, 0, NULL};
    const fw_conv project = {1, 1, 50, 1, 1, 40, FW_VECTORS(10), VL, 1, 0, 9, 0, 0, FW_CS(40), 0, 0,
                             0, 0, FW_CS(10), 0, 0, FW_CS(10), NULL};
    const fw_block block = {&expand, &project, first, second, NULL, NULL, 0, 8, 8};
    const fw_block_data data = {y, y, y, p[0], p[1], NULL, NULL, NULL, NULL, p[2], p[3], NULL};
    for (int t = 0; t < threads; t++) fw_chain(&block, &data, scratch, t, threads);
}
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_chain(build, threads):
    """The MLP of a block in place: 50 pixels in strips of 8, the last one of 2."""
    library = build(CONV_HEAD.replace("conv.h", "fused.h") + CHAIN)
    lanes = library.lanes()
    x, weights, biases = (
        noise(1, 10, 1, 50),
        [noise(40, 10, 1, 1), noise(10, 40, 1, 1)],
        [noise(40), noise(10)],
    )
    hidden = layer(x, weights[0], biases[0], 1, 1, True)
    expected = layer(hidden, weights[1], biases[1], 1, 1, False) + x
    y = np.nan_to_num(to_pixel(x, lanes))
    packed = [
        *(pack.conv_weights(weights[0], lanes, 2), pack.pad_channels(biases[0], lanes)),
        *(pack.conv_weights(weights[1], lanes, 1), pack.pad_channels(biases[1], lanes)),
    ]
    pointers = np.array([a.ctypes.data for a in packed], np.uintp)
    scratch = np.empty(threads * 8 * -(-40 // lanes) * lanes, np.float32)
    call(library.run, pointers, y, scratch, threads)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, :10], expected, rtol=1e-4, atol=1e-3)


STEM = """
FW_DEFINE_CONV(stem, 4, 2, FW_TAIL(FW_VECTORS(20), 2), FW_EPILOGUE_RELU, 0)
void run(const float *const *p, float *y, float *scratch, int threads);
void run(const float *const *p, float *y, float *scratch, int threads) {
    const fw_conv expand = {
        .columns = 7, .tap_rows = 3, .tap_columns = 1, .depth = 9, .vectors = FW_VECTORS(20), .lanes = VL,
        .block_groups = 1, .x_image = 3 * 15 * 13, .x_row = 2 * 3 * 15, .x_column = 6, .x_tap_row = 3 * 15,
        .y_column = FW_CS(20)};
    const fw_depthwise depthwise = {
        2, 6, 6, 3, 3, 1, 1, 1, FW_VECTORS(20), VL, 0, 7 * FW_CS(20), FW_CS(20),
        6 * 7 * FW_CS(20), 7 * FW_CS(20), FW_CS(20), 0, 0, 0};
    const fw_block block = {&expand, NULL, stem, NULL, &depthwise, spans, 1, 2, 4};
    const fw_block_data data = {p[0], NULL, y, p[1], p[2], NULL, p[3], p[4], NULL, NULL, NULL, NULL};
    for (int t = 0; t < threads; t++) fw_inverted(&block, &data, scratch, t, threads);
}
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_stem(build, threads):
    """A 3x3 convolution of stride 2 on three tight channels, straight into a depthwise one."""
    tile = "FW_DEFINE_DEPTHWISE_TILE(tile, 3, 1, 1, 7, 1, 8, FW_EPILOGUE_NONE, 0)\n"
    spans = "static const fw_depthwise_span spans[] = {{tile, 1, 0, 7, 0, 7}};\n"
    library = build(CONV_HEAD.replace("conv.h", "fused.h") + tile + spans + STEM)
    lanes = library.lanes()
    x, bias, shift = noise(2, 3, 11, 13), noise(20) + 1, noise(20)
    weight, depthwise = noise(20, 3, 3, 3), noise(20, 1, 3, 3)
    expected = layer(layer(x, weight, bias, 2, 1, True), depthwise, shift, 1, 20, False)
    image = np.ascontiguousarray(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 3, 1))
    packed = [
        *(image, pack.conv_weights(weight, lanes, 2), pack.pad_channels(bias, lanes)),
        *(pack.depthwise_weights(depthwise, lanes), pack.pad_channels(shift, lanes)),
    ]
    floats = -(-20 // lanes) * lanes
    y = np.full((2, 6, 7, floats), np.nan, np.float32)
    pointers = np.array([a.ctypes.data for a in packed], np.uintp)
    call(library.run, pointers, y, np.empty(threads * 4 * 7 * floats, np.float32), threads)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, :20], expected, rtol=1e-4, atol=1e-4)
