"""Compiles a kernel alone for every vector length of this machine; shared by the float32 kernels' tests."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import featherweight.compiler as compiler

KERNELS = Path(compiler.__file__).parent / "kernels"
NATIVE = ("-std=gnu99", "-O2", "-march=native")
BUILDS = {
    "native": NATIVE,
    "vl8": (*NATIVE, "-DFW_VL=8"),
    "vl4": (*NATIVE, "-DFW_VL=4"),
    "generic": ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-DFW_GENERIC"),
    "checked": ("-std=gnu99", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
}
EXTRA = os.environ.get("FEATHERWEIGHT_TEST_CFLAGS", "").split()
UNTOUCHED = -77.0


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """Return a function (source) -> ctypes library, for one set of flags."""
    folder = tmp_path_factory.mktemp(request.param)

    def compile_source(source):
        path = folder / f"{len(list(folder.iterdir()))}.c"
        path.write_text(source + "\nint lanes(void);\nint lanes(void) { return VL; }\n")
        library = path.with_suffix(".so")
        flags = [*BUILDS[request.param], *EXTRA, "-fPIC", "-shared", f"-I{KERNELS}"]
        command = ["cc", *flags, "-o", str(library), str(path), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(str(library))

    return compile_source


def call(function, *arguments):
    """Call a C function with arrays as pointers and numbers as int; return its int, if it has one."""
    return function(*(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments))


def noise(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def to_pixel(x, lanes, padding=((0, 0), (0, 0))):
    """Return (N, C, H, W) channels last, whole vectors, a border of zeros; NaN in the other lanes."""
    channels = x.shape[1]
    x = np.pad(x, ((0, 0), (0, 0), *padding)).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(
        np.pad(x, ((0, 0), (0, 0), (0, 0), (0, -channels % lanes)), constant_values=np.nan), np.float32
    )
