"""The 8-bit kernels compiled alone, and their structs in ctypes: what the tests of 8-bit kernels share."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import featherweight.compiler as compiler

KERNELS = Path(compiler.__file__).parent / "kernels"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi")
CHECKED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")
BUILDS = {
    "native": ("-std=gnu99", "-O2", "-march=native", *WARNINGS),
    "generic": ("-std=c99", "-pedantic", "-O1", "-DFW_GENERIC", *WARNINGS),
    "contracted": ("-std=gnu99", "-O2", "-march=native", "-DFW_GENERIC"),
    "tiles": ("-std=gnu99", "-O2", "-march=native", "-mno-amx-int8"),
    "v3": ("-std=gnu99", "-O2", "-march=x86-64-v3", *WARNINGS),
    "v4": ("-std=gnu99", "-O2", "-march=x86-64-v4", *WARNINGS),
    "checked": ("-std=gnu99", "-O1", "-march=native", *CHECKED),
}
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
INT, SIZE, FLOAT, POINTER = ctypes.c_int, ctypes.c_ssize_t, ctypes.c_float, ctypes.c_void_p
SLACK = 128


class Out(ctypes.Structure):
    """`fw_int8_out`."""

    _fields_ = (
        [("lanes", INT)]
        + [(n, SIZE) for n in ("y_image", "y_row", "y_column", "r_image", "r_row", "r_column")]
        + [(n, INT) for n in ("zero", "lo", "hi", "q_zero", "r_zero")]
        + [(n, FLOAT) for n in ("ratio", "r_ratio", "real_lo", "real_hi")]
        + [("table", POINTER)]
    )


class Conv(ctypes.Structure):
    """`fw_int8_conv`."""

    _fields_ = (
        [(n, INT) for n in ("images", "rows", "columns", "tap_rows", "tap_columns", "depth4", "blocks")]
        + [("columns_first", INT)]
        + [(n, SIZE) for n in ("x_image", "x_row", "x_column", "x_tap_row", "x_tap_column")]
        + [("first", POINTER), ("out", Out)]
    )


class Depthwise(ctypes.Structure):
    """`fw_int8_depthwise`."""

    _fields_ = (
        [
            (n, INT)
            for n in ("images", "rows", "columns", "in_rows", "in_columns", "stride_rows", "dilation_rows")
        ]
        + [(n, INT) for n in ("pad_top", "pad_left", "blocks", "x_zero")]
        + [(n, SIZE) for n in ("x_image", "x_row", "x_column")]
        + [("out", Out)]
    )


class Binary(ctypes.Structure):
    """`fw_u8_binary`."""

    _fields_ = (
        *((n, INT) for n in ("a_zero", "b_zero", "zero", "lo", "hi")),
        ("a_ratio", FLOAT),
        ("b_ratio", FLOAT),
    )


class Window(ctypes.Structure):
    """`fw_u8_window`."""

    _fields_ = (
        [(n, INT) for n in ("images", "rows", "columns", "in_rows", "in_columns", "blocks", "tap_rows")]
        + [(n, INT) for n in ("tap_columns", "stride_rows", "stride_columns", "pad_top", "pad_left")]
        + [(n, INT) for n in ("average", "x_zero", "zero")]
        + [("ratio", FLOAT)]
        + [(n, SIZE) for n in ("x_image", "x_row", "x_column", "y_image", "y_row", "y_column")]
    )


TILES = {(1, 1), (7, 2), (3, 3), (5, 1), (14, 2), (1, 4)}
OUTS = ("quantise", "table", "add", "real", "shift", "relu")
KERNELS_OF_DEPTHWISE = (
    (3, 3, 1),
    (3, 3, 2),
    (5, 5, 1),
    (5, 5, 2),
    (7, 7, 1),
    (1, 5, 1),
    (3, 1, 1),
    (2, 4, 4),
)


def source():
    """Instances of every kernel, exported through wrappers of the same arguments."""
    files = ("int8.h", "int8_depthwise.h", "int8_elementwise.h")
    lines = [f'#include "{file}"' for file in files]
    args = "const int8_t *w, const int32_t *b, const float *m, const uint8_t *r, void *y"
    for mr, nr in sorted(TILES):
        for nt in range(1, nr + 1):
            for out in OUTS if (mr, nr) == (7, 2) else OUTS[:1]:
                name = f"conv_{mr}_{nr}_{nt}_{out}"
                lines += [
                    f"FW_DEFINE_INT8_CONV({name}, {mr}, {nr}, {nt}, {out})",
                    f"void run_{name}(const fw_int8_conv *s, const uint8_t *x, {args}, int t, int n) "
                    f"{{ {name}(s, x, w, b, m, r, y, t, n); }}",
                ]
    for kh, kw, stride in KERNELS_OF_DEPTHWISE:
        for out in OUTS if (kh, stride) == (3, 2) else OUTS[:1]:
            name = f"depthwise_{kh}_{kw}_{stride}_{out}"
            lines += [
                f"FW_DEFINE_INT8_DEPTHWISE({name}, {kh}, {kw}, {stride}, {out})",
                f"void run_{name}(const fw_int8_depthwise *s, const uint8_t *x, {args}, uint8_t *q, int t, "
                f"int n) {{ {name}(s, x, w, b, m, r, y, q, t, n); }}",
            ]
    return "\n".join(lines) + "\n" + ELEMENTWISE


ELEMENTWISE = """
#define U8 const uint8_t *
void run_flip(U8 x, uint8_t *y, ptrdiff_t n, int t, int k) { fw_u8_flip(x, y, n, t, k); }
void run_table(U8 x, uint8_t *y, ptrdiff_t n, U8 a, int t, int k) { fw_u8_table(x, y, n, a, t, k); }
void run_quantise(const float *x, uint8_t *y, ptrdiff_t n, const float *s, int z, int t, int k) {
    fw_u8_quantise(x, y, n, *s, z, t, k); }
void run_dequantise(U8 x, float *y, ptrdiff_t n, const float *s, int z, int t, int k) {
    fw_u8_dequantise(x, y, n, *s, z, t, k); }
void run_add(const fw_u8_binary *s, U8 a, U8 b, uint8_t *y, ptrdiff_t n, int t, int k) {
    fw_u8_add(s, a, b, y, n, t, k); }
void run_multiply(const fw_u8_binary *s, U8 a, U8 b, uint8_t *y, ptrdiff_t n, int t, int k) {
    fw_u8_multiply(s, a, b, y, n, t, k); }
void run_gate(const fw_u8_binary *s, U8 a, U8 b, uint8_t *y, int p, int c, int t, int k) {
    fw_u8_gate(s, a, b, y, p, c, t, k); }
void run_global_pool(U8 x, uint8_t *y, int p, ptrdiff_t c, int b, int xz, const float *s, int z, int t,
                     int k) {
    fw_u8_global_pool(x, y, p, c, b, xz, *s, z, t, k); }
void run_pool(const fw_u8_window *s, U8 x, uint8_t *y, int t, int k) { fw_u8_pool(s, x, y, t, k); }
void run_pad(U8 x, uint8_t *y, int r, int c, int p, int a, int b, int d, int e, int v, int t, int k) {
    fw_u8_pad(x, y, r, c, p, a, b, d, e, v, t, k); }
void run_copy(U8 x, ptrdiff_t a, uint8_t *y, ptrdiff_t b, int p, int c, U8 table, int t, int k) {
    fw_u8_copy(x, a, y, b, p, c, table, t, k); }
void run_gather(U8 x, ptrdiff_t a, uint8_t *y, ptrdiff_t b, int p, int c, const int16_t *i, int t, int k) {
    fw_u8_gather(x, a, y, b, p, c, i, t, k); }
void run_image(const float *x, uint8_t *y, int n, int r, int c, int p, int a, int b, int d, int e,
               const float *s, int z, int t, int k) {
    fw_u8_image(x, y, n, r, c, p, a, b, d, e, *s, z, t, k); }
void run_planar(U8 x, ptrdiff_t a, uint8_t *y, int p, int c, int t, int k) {
    fw_u8_planar(x, a, y, p, c, t, k); }
"""


LOADED = {}


def build_library(folder, name):
    """Compile every kernel with the flags of a build and load it, once in a session."""
    if name not in LOADED:
        LOADED[name] = _compiled(folder, name)
    return LOADED[name]


def _compiled(folder, name):
    if name != "generic" and platform.machine() != "x86_64":
        pytest.skip("the flags of this build are for x86-64")
    path = Path(folder) / f"{name}.c"
    path.write_text(source())
    command = ["cc", *BUILDS[name], "-fPIC", "-shared", f"-I{KERNELS}", "-o", str(path.with_suffix(".so"))]
    done = subprocess.run([*command, str(path), "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(path.with_suffix(".so")))


def pointer(array):
    """The address of an array, kept alive by the caller."""
    return POINTER(None if array is None else array.ctypes.data)


def call(lib, name, *arguments, threads=2):
    """Run a kernel once for every thread, one after the other."""
    for tid in range(threads):
        values = [
            pointer(a)
            if isinstance(a, np.ndarray) or a is None
            else ctypes.byref(a)
            if isinstance(a, ctypes.Structure)
            else a
            for a in arguments
        ]
        getattr(lib, f"run_{name}")(*values, INT(tid), INT(threads))
