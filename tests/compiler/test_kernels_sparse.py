"""The kernels of planar regions, compiled alone, against numpy in float64."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import featherweight.compiler as compiler
from featherweight.compiler import pack_sparse

KERNELS = Path(compiler.__file__).parent / "kernels"
BUILDS = {
    "native": ("-std=gnu99", "-O2", "-march=native", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"),
    "vl8": ("-std=gnu99", "-O2", "-march=native", "-DFW_VL=8"),
    "generic": ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-DFW_GENERIC"),
    "checked": ("-std=gnu99", "-O1", "-march=native", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
}
POINTER, INT, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
SLACK = 16
PIXELS = (1, 7, 49, 196, 300)
PLANAR = ((3, 3, 1, 4), (3, 3, 2, 2), (5, 5, 1, 2), (5, 5, 2, 1), (1, 3, 1, 3))
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


class Part(ctypes.Structure):
    """`fw_sparse_part`."""

    _fields_ = (("blocks", INT), *((n, POINTER) for n in ("values", "offset", "count", "row")))


class Sparse(ctypes.Structure):
    """`fw_sparse`."""

    _fields_ = (
        *((n, INT) for n in ("images", "vectors", "groups", "parts")),
        *((n, SIZE) for n in ("x_image", "y_image", "y_plane", "r_image", "r_plane")),
    )


class Planar(ctypes.Structure):
    """`fw_planar`."""

    _fields_ = (
        *((n, INT) for n in ("images", "channels", "rows", "columns", "in_rows", "in_columns")),
        *((n, INT) for n in ("pad_top", "pad_left", "taps")),
        ("x_plane", SIZE),
        ("y_plane", SIZE),
    )  # fmt: skip


def source(lanes):
    """One kernel for each count of pixels, block height and epilogue."""
    slope = "#define SLOPE(v, r, aux) ((v) * vf_set((aux)[0]))"
    lines = ['#include "sparse_region.h"', slope]
    for pixels in PIXELS:
        vectors = -(-pixels // lanes)
        for rows in (1, 2, 4):
            v = min(4 // rows + 1, vectors)
            for tag, epilogue, residual in (
                ("plain", "FW_EPILOGUE_NONE", 0),
                ("add", "FW_EPILOGUE_ADD_RELU", 1),
                ("slope", "SLOPE", 0),
            ):
                name = f"sparse_{pixels}_{rows}_{tag}"
                lines += [
                    f"FW_DEFINE_SPARSE({name}, {v}, {vectors % v or v}, {rows}, {epilogue}, {residual})",
                    f"void run_{name}(const fw_sparse *s, const fw_sparse_part *p, const float *x, "
                    "const float *a, const float *r, float *y, int t, int n) "
                    f"{{ {name}(s, p, x, a, r, y, t, n); }}",
                ]
    for kh, kw, stride, rows in PLANAR:
        name = f"planar_{kh}_{kw}_{stride}"
        lines += [
            f"FW_DEFINE_PLANAR_DEPTHWISE({name}, {kh}, {kw}, {stride}, {rows}, FW_EPILOGUE_RELU)",
            f"void run_{name}(const fw_planar *s, const float *x, const float *w, const float *b, float *y, "
            f"int t, int n) {{ {name}(s, x, w, b, b, y, t, n); }}",
            f"FW_DEFINE_SPARSE_DEPTHWISE(block_{name}, 3, {kh}, {stride}, FW_EPILOGUE_RELU, {name})",
            f"void run_block_{name}(const fw_sparse *s, const fw_sparse_part *p, const fw_planar *q, "
            "const int *r, const float *x, const float *w, const float *b, float *y, float *m, int t, int n) "
            f"{{ block_{name}(s, p, q, r[0], x, b, w, b, b, y, m, t, n); }}",
            f"FW_DEFINE_PLANAR_CONV(conv_{name}, {kh}, {kw}, {stride}, 2, 2, FW_EPILOGUE_RELU)",
            f"void run_conv_{name}(const fw_planar *q, const fw_sparse *s, const fw_sparse_part *p, "
            "const int *c, const float *x, float *y, float *m, int t, int n) "
            f"{{ conv_{name}(q, s, p, c[0], c[1], x, x, y, m, t, n); }}",
        ]
    lines.append(
        "void run_mean(const int64_t *s, const float *x, float *y, int t, int n) "
        "{ fw_planar_mean(s[0], (int)s[1], s[2], x, y, t, n); }"
    )
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return a function: build name -> ctypes library with every kernel."""
    folder, made = tmp_path_factory.mktemp("sparse_kernels"), {}

    def compiled(path, text, flags):
        path.write_text(text)
        command = ["cc", *flags, "-fPIC", "-shared", f"-I{KERNELS}", "-o", str(path.with_suffix(".so"))]
        done = subprocess.run([*command, str(path), "-lm"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(str(path.with_suffix(".so")))

    def build(name):
        if name != "generic" and platform.machine() != "x86_64":
            pytest.skip("the flags of this build are for x86-64")
        if name not in made:
            probe = '#include "vector.h"\nint lanes(void) { return VL; }\n'
            lanes = compiled(folder / f"{name}_lanes.c", probe, BUILDS[name]).lanes()
            made[name] = compiled(folder / f"{name}.c", source(lanes), BUILDS[name]), lanes
        return made[name]

    return build


def call(lib, name, *arguments, threads):
    """Run a kernel once for every thread, one after the other."""
    values = [POINTER(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.byref(a) for a in arguments]
    for tid in range(threads):
        getattr(lib, f"run_{name}")(*values, INT(tid), INT(threads))


def planes(array, lanes):
    """A float32 copy (N, C, P) whose planes are whole vectors; what lies behind the last pixel is noise."""
    n, c = array.shape[:2]
    flat = array.reshape(n, c, -1).astype(np.float32)
    room = -flat.shape[2] % lanes
    return np.concatenate([flat, np.full((n, c, room), 1e3, np.float32)], 2)


def part_array(parts):
    """`fw_sparse_part[]`; the arrays stay alive as long as the parts."""
    return (Part * len(parts))(
        *(
            Part(part.blocks, *(a.ctypes.data for a in (part.values, part.offset, part.count, part.row)))
            for part in parts
        )
    )


def run_sparse(lib, lanes, name, weight, bias, x, aux, r, rows, groups, parts, threads):
    """Run all parts of a matrix; returns (N, O, P)."""
    images, _, pixels = x.shape
    xs, rs = planes(x, lanes), planes(r, lanes)
    pitch, outputs = xs.shape[2], len(weight)
    y = np.full(images * outputs * pitch + lanes, 77, np.float32)
    packed = pack_sparse.sparse_weights(weight, bias, pitch, rows, groups, parts)
    for height in {part.rows_per_block for part in packed}:
        own = [part for part in packed if part.rows_per_block == height]
        shape = Sparse(
            images, pitch // lanes, groups, len(own), x.shape[1] * pitch, outputs * pitch, pitch,
            outputs * pitch, pitch,
        )  # fmt: skip
        call(lib, name.format(rows=height), shape, part_array(own), xs, aux, rs, y, threads=threads)
    assert (y[-lanes:] == 77).all()
    return y[:-lanes].reshape(images, outputs, pitch)[:, :, :pixels]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("tag", ["plain", "add", "slope"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("pixels", PIXELS)
def test_sparse_equals_dense(library, build, pixels, rows, tag):
    rng = np.random.default_rng(pixels + rows)
    lib, lanes = library(build)
    for sparsity in (0.0, 0.5, 0.9, 0.99, 1.0):
        outputs, inputs, images = int(rng.integers(1, 30)), int(rng.integers(1, 40)), 2
        weight = rng.normal(size=(outputs, inputs)) * (rng.random((outputs, inputs)) >= sparsity)
        weight = np.where(weight == 0, -0.0, weight)
        bias, slope = rng.normal(size=(2, outputs))
        x = rng.normal(size=(images, inputs, pixels))
        r = rng.normal(size=(images, outputs, pixels))
        want = np.einsum("ok,nkp->nop", weight, x) + bias[:, None]
        want = np.maximum(want + r, 0) if tag == "add" else want * slope[:, None] if tag == "slope" else want
        name = f"sparse_{pixels}_{{rows}}_{tag}"
        groups, parts, threads = (int(rng.integers(1, 4)) for _ in range(3))
        got = run_sparse(
            lib, lanes, name, weight, bias, x, slope.astype(np.float32), r, rows, groups, parts, threads
        )
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def convolve(x, weight, bias, stride, top, left, depthwise):
    """ReLU of a convolution of (N, C, H, W) in float64, weight (O, C, KH, KW)."""
    kh, kw = weight.shape[2:]
    oh, ow = (x.shape[2] + 2 * top - kh) // stride + 1, (x.shape[3] + 2 * left - kw) // stride + 1
    border = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    want = np.zeros((len(x), len(weight), oh, ow)) + bias[:, None, None]
    for ty in range(kh):
        for tx in range(kw):
            part = border[:, :, ty : ty + oh * stride : stride, tx : tx + ow * stride : stride][
                :, :, :oh, :ow
            ]
            taps = weight[:, :, ty, tx]
            want += part * taps[:, :1, None] if depthwise else np.einsum("ok,nkhw->nohw", taps, part)
    return np.maximum(want, 0)


SIZES = [(1, 1), (7, 7), (14, 14), (9, 40), (5, 33)]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("kh", "kw", "stride", "rows"), PLANAR)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_planar_depthwise(library, build, kh, kw, stride, rows, height, width):
    rng = np.random.default_rng(height)
    lib, lanes = library(build)
    x, weight, bias = (
        rng.normal(size=(2, 3, height, width)),
        rng.normal(size=(3, 1, kh, kw)),
        rng.normal(size=3),
    )
    top, left = kh // 2, kw // 2
    want = convolve(x, weight, bias, stride, top, left, depthwise=True)
    oh, ow = want.shape[2:]
    xs, y = planes(x, lanes), planes(np.full(want.shape, 77), lanes)
    shape = Planar(2, 3, oh, ow, height, width, top, left, kh * kw, xs.shape[2], y.shape[2])
    arrays = [a.astype(np.float32) for a in (weight, bias)]
    call(lib, f"planar_{kh}_{kw}_{stride}", shape, xs, *arrays, y, threads=2)
    np.testing.assert_allclose(y[:, :, : oh * ow].reshape(want.shape), want, rtol=1e-5, atol=1e-5)
    assert (y[:, :, oh * ow :] == 1e3).all()


@pytest.mark.parametrize("build", ["native", "generic", "checked"])
@pytest.mark.parametrize(("kh", "kw", "stride", "rows"), PLANAR)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sparse_with_depthwise(library, build, kh, kw, stride, rows, height, width):
    rng = np.random.default_rng(height)
    lib, lanes = library(build)
    inputs, channels = 5, 7
    vectors = -(-height * width // lanes)
    first = rng.normal(size=(channels, inputs)) * (rng.random((channels, inputs)) < 0.4)
    second, bias = rng.normal(size=(channels, 1, kh, kw)), rng.normal(size=channels)
    x = rng.normal(size=(2, inputs, height, width))
    middle = np.maximum(np.einsum("ok,nkhw->nohw", first, x) + bias[:, None, None], 0)
    want = convolve(middle, second, bias, stride, kh // 2, kw // 2, depthwise=True)
    oh, ow = want.shape[2:]
    xs, y = planes(x, lanes), planes(np.zeros(want.shape), lanes)
    pitch = xs.shape[2]
    packed = pack_sparse.sparse_weights(first, bias, pitch, parts=2)
    shape = Sparse(2, vectors, 1, len(packed), inputs * pitch, 0, pitch, 0, 0)
    planar = Planar(2, channels, oh, ow, height, width, kh // 2, kw // 2, kh * kw, pitch, y.shape[2])
    arrays = [a.astype(np.float32) for a in (second, bias)]
    scratch = np.zeros(2 * pitch + lanes, np.float32)
    name = f"block_planar_{kh}_{kw}_{stride}"
    for strip in (1, 3, oh):
        y[:] = 0
        sizes = np.array([strip], np.int32)
        call(lib, name, shape, part_array(packed), planar, sizes, xs, *arrays, y, scratch, threads=2)
        np.testing.assert_allclose(y[:, :, : oh * ow].reshape(want.shape), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", ["native", "generic", "checked"])
@pytest.mark.parametrize(("kh", "kw", "stride", "rows"), PLANAR)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_planar_convolution(library, build, kh, kw, stride, rows, height, width):
    rng = np.random.default_rng(height)
    lib, lanes = library(build)
    channels, filters = 3, 6
    x, bias = rng.normal(size=(2, channels, height, width)), rng.normal(size=filters)
    weight = rng.normal(size=(filters, channels, kh, kw))
    weight[0, 0] = 0
    want = convolve(x, weight, bias, stride, kh // 2, kw // 2, depthwise=False)
    oh, ow = want.shape[2:]
    chunk = min(lanes // np.gcd(ow, lanes), oh)
    vectors = -(-chunk * ow // lanes)
    pitch = (vectors + 1) * lanes
    packed = pack_sparse.sparse_weights(weight.reshape(filters, -1), bias, pitch, 2, keep_zeros=True)
    y = planes(np.zeros(want.shape), lanes)
    planes_of_x = x.astype(np.float32)
    planar = Planar(2, channels, oh, ow, height, width, kh // 2, kw // 2, kh * kw, height * width, y.shape[2])
    shape = Sparse(2, vectors, 1, len(packed), pitch, filters * y.shape[2], y.shape[2], 0, 0)
    scratch = np.zeros(2 * channels * kh * kw * pitch + lanes, np.float32)
    sizes = np.array([chunk, channels], np.int32)
    name = f"conv_planar_{kh}_{kw}_{stride}"
    call(lib, name, planar, shape, part_array(packed), sizes, planes_of_x, y, scratch, threads=2)
    np.testing.assert_allclose(y[:, :, : oh * ow].reshape(want.shape), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_planar_mean(library, build, pixels):
    lib, lanes = library(build)
    x = np.random.default_rng(0).normal(size=(2, 5, pixels))
    xs, y = planes(x, lanes), np.zeros(10, np.float32)
    call(lib, "mean", np.array([10, pixels, xs.shape[2]], np.int64), xs, y, threads=3)
    np.testing.assert_allclose(y, x.mean(2).reshape(-1), rtol=1e-5, atol=1e-6)


def test_blocks_are_chosen_where_they_are_full():
    rng = np.random.default_rng(0)
    for rows in (4, 2):
        kept = rng.random((16 // rows, 50)) < 0.2
        assert pack_sparse.best_rows(np.repeat(kept, rows, 0).astype(np.float32)) == rows
    assert pack_sparse.best_rows((rng.random((16, 50)) < 0.2).astype(np.float32)) == 1


def test_stripes_fit_registers_and_cache():
    weight = np.random.default_rng(0).random((160, 960)) * (np.arange(960) % 10 == 0)
    for vectors in (1, 4, 13, 49, 784):
        for lanes, registers in ((16, 32), (8, 16), (4, 16)):
            plan = pack_sparse.plan_stripes(weight, vectors, lanes, registers)
            assert plan.vectors <= vectors
            assert plan.rows * (plan.vectors + 1) < registers
            assert 960 * plan.vectors * lanes * 4 / plan.groups <= 1.2 * pack_sparse.STRIPE_BYTES


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_share_the_nonzeros(parts):
    weight = np.random.default_rng(0).random((64, 100)) < 0.1
    packed = pack_sparse.sparse_weights(weight.astype(np.float32), None, 64, parts=parts)
    assert len(packed) == parts
    assert sorted(np.concatenate([part.row for part in packed])) == list(range(64))
    share = [part.count.sum() for part in packed]
    assert max(share) < 1.3 * weight.sum() / parts
