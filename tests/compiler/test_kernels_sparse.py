"""The sparse 1x1 and planar depthwise kernels, compiled alone, against numpy in float64."""

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


class Sparse(ctypes.Structure):
    """`fw_sparse`."""

    _fields_ = (
        [(n, INT) for n in ("images", "pixels", "blocks")]
        + [(n, SIZE) for n in ("x_image", "y_image", "y_plane", "r_image", "r_plane")]
        + [(n, POINTER) for n in ("values", "offset", "start", "row")]
    )


class Planar(ctypes.Structure):
    """`fw_planar`."""

    _fields_ = tuple(
        (n, INT)
        for n in ("images", "channels", "rows", "columns", "in_rows", "in_columns", "pad_top", "pad_left")
    )


def source(lanes):
    """One kernel for each count of pixels, block height and epilogue."""
    slope = "#define SLOPE(v, r, aux) ((v) * vf_set((aux)[0]))"
    lines = ['#include "sparse.h"', '#include "planar.h"', slope]
    for pixels in PIXELS:
        for rows in (1, 2, 4):
            v = min(4 // rows + 1, -(-pixels // lanes))
            last = -(-(pixels % (v * lanes)) // lanes) or v
            for tag, epilogue, residual in (
                ("plain", "FW_EPILOGUE_NONE", 0),
                ("add", "FW_EPILOGUE_ADD_RELU", 1),
                ("slope", "SLOPE", 0),
            ):
                name = f"sparse_{pixels}_{rows}_{tag}"
                lines += [
                    f"FW_DEFINE_SPARSE({name}, {v}, {last}, {rows}, {epilogue}, {residual})",
                    f"void run_{name}(const fw_sparse *s, const float *x, const float *a, const float *r, "
                    f"float *y, int t, int n) {{ {name}(s, x, a, r, y, t, n); }}",
                ]
    for kh, kw, stride, rows in PLANAR:
        name = f"planar_{kh}_{kw}_{stride}"
        lines += [
            f"FW_DEFINE_PLANAR_DEPTHWISE({name}, {kh}, {kw}, {stride}, {rows}, FW_EPILOGUE_RELU)",
            f"void run_{name}(const fw_planar *s, const float *x, const float *w, const float *b, float *y, "
            f"int t, int n) {{ {name}(s, x, w, b, b, y, t, n); }}",
        ]
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
            made[name] = compiled(folder / f"{name}.c", source(lanes), BUILDS[name])
        return made[name]

    return build


def call(lib, name, *arguments, threads):
    """Run a kernel once for every thread, one after the other."""
    values = [POINTER(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.byref(a) for a in arguments]
    for tid in range(threads):
        getattr(lib, f"run_{name}")(*values, INT(tid), INT(threads))


def slack(array):
    """A flat float32 copy with room behind it that a kernel may read."""
    return np.concatenate([array.reshape(-1).astype(np.float32), np.full(SLACK, np.nan, np.float32)])


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("tag", ["plain", "add", "slope"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("pixels", PIXELS)
def test_sparse_equals_dense(library, build, pixels, rows, tag):
    rng = np.random.default_rng(pixels + rows)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        outputs, inputs, images = int(rng.integers(1, 30)), int(rng.integers(1, 40)), 2
        weight = rng.normal(size=(outputs, inputs)) * (rng.random((outputs, inputs)) >= sparsity)
        weight = np.where(weight == 0, -0.0, weight)
        bias, slope = rng.normal(size=(2, outputs))
        x = rng.normal(size=(images, inputs, pixels))
        r = rng.normal(size=(images, outputs, pixels))
        want = np.einsum("ok,nkp->nop", weight, x) + bias[:, None]
        want = np.maximum(want + r, 0) if tag == "add" else want * slope[:, None] if tag == "slope" else want
        y = np.full(want.size + SLACK, 77, np.float32)
        xs, rs, aux = slack(x), slack(r), slope.astype(np.float32)
        for part in pack_sparse.sparse_weights(weight, bias, pixels, rows):
            arrays = (part.values, part.offset, part.start, part.row)
            whole = outputs * pixels
            shape = Sparse(
                images, pixels, len(part.row), inputs * pixels, whole, pixels, whole, pixels,
                *(a.ctypes.data for a in arrays),
            )  # fmt: skip
            name = f"sparse_{pixels}_{part.rows_per_block}_{tag}"
            call(library(build), name, shape, xs, aux, rs, y, threads=int(rng.integers(1, 4)))
        np.testing.assert_allclose(y[:-SLACK].reshape(want.shape), want, rtol=2e-5, atol=2e-5)
        assert (y[-SLACK:] == 77).all()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("kh", "kw", "stride", "rows"), PLANAR)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 7), (14, 14), (9, 40), (5, 33)])
def test_planar_depthwise(library, build, kh, kw, stride, rows, height, width):
    rng = np.random.default_rng(height)
    top, left = kh // 2, kw // 2
    oh, ow = (height + 2 * top - kh) // stride + 1, (width + 2 * left - kw) // stride + 1
    x, weight, bias = rng.normal(size=(2, 3, height, width)), rng.normal(size=(3, kh, kw)), rng.normal(size=3)
    border = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
    want = np.zeros((2, 3, oh, ow)) + bias[:, None, None]
    for ty in range(kh):
        for tx in range(kw):
            part = border[:, :, ty : ty + oh * stride : stride, tx : tx + ow * stride : stride]
            want += part[:, :, :oh, :ow] * weight[:, ty, tx, None, None]
    want = np.maximum(want, 0)
    y = np.full(want.size + SLACK, 77, np.float32)
    shape = Planar(2, 3, oh, ow, height, width, top, left)
    arrays = [a.astype(np.float32) for a in (x, weight, bias)]
    call(library(build), f"planar_{kh}_{kw}_{stride}", shape, *arrays, y, threads=2)
    np.testing.assert_allclose(y[:-SLACK].reshape(want.shape), want, rtol=1e-5, atol=1e-5)
    assert (y[-SLACK:] == 77).all()


def test_blocks_are_chosen_where_they_are_full():
    rng = np.random.default_rng(0)
    for rows in (4, 2):
        kept = rng.random((16 // rows, 50)) < 0.2
        assert pack_sparse.best_rows(np.repeat(kept, rows, 0).astype(np.float32)) == rows
    assert pack_sparse.best_rows((rng.random((16, 50)) < 0.2).astype(np.float32)) == 1
