"""What the generated C may not do: allocate, keep state, race, read or write where nothing is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_files import make_model, node, save, tiny_convnet
from test_networks import export
from test_quantised import Builder

from featherweight.compiler.build import (
    COMMON,
    build_library,
    find_compiler,
    runs_on_this_machine,
    target_named,
)
from featherweight.compiler.driver import generate, write_files
from featherweight.shrink.quantize import quantize_onnx

ALLOWED = {"memcpy", "memset", "memmove", "syscall", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
"""What generated code may call besides libm: nothing that allocates, prints or keeps state."""

TEAM = {
    "sched_yield",
    "pthread_cond_broadcast",
    "pthread_cond_destroy",
    "pthread_cond_init",
    "pthread_cond_wait",
}
TEAM |= {f"pthread_{name}" for name in ("create", "join")}
TEAM |= {f"pthread_mutex_{name}" for name in ("destroy", "init", "lock", "unlock")}

RACE = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model.h"
enum { THREADS = 4, RUNS = 25 };
static char *weights;
static char *block(size_t size) {
    char *p = (char *)calloc(1, size + 64);
    return p + (64 - (size_t)p % 64);
}
typedef struct { int number; char *in, *out; } job;
static void *work(void *argument) {
    job *j = (job *)argument;
    const void *in[1] = {j->in};
    char *expected = block(OUT_BYTES);
    void *out[1] = {j->out};
    model_context *c = model_init(block(MODEL_CONTEXT_BYTES), weights);
    model_run(c, in, out);
    memcpy(expected, j->out, OUT_BYTES);
    for (int i = 0; i < RUNS; i++) {
        memset(j->out, 1, OUT_BYTES);
        model_run(c, in, out);
        if (memcmp(expected, j->out, OUT_BYTES)) { printf("thread %d differs\\n", j->number); exit(1); }
    }
    model_close(c);
    return NULL;
}
int main(int count, char **words) {
    pthread_t threads[THREADS];
    job jobs[THREADS];
    FILE *file = fopen(words[count - 1], "rb");
    weights = block(MODEL_WEIGHTS_BYTES);
    if (!file || fread(weights, 1, MODEL_WEIGHTS_BYTES, file) != MODEL_WEIGHTS_BYTES) return 2;
    for (int t = 0; t < THREADS; t++) {
        jobs[t].number = t, jobs[t].in = block(IN_BYTES), jobs[t].out = block(OUT_BYTES);
        for (size_t i = 0; i < IN_BYTES / 4; i++) ((float *)jobs[t].in)[i] = (float)((i * (t + 3)) % 17) - 8;
        pthread_create(threads + t, NULL, work, jobs + t);
    }
    for (int t = 0; t < THREADS; t++) pthread_join(threads[t], NULL);
    for (int t = 1; t < THREADS; t++)
        if (!memcmp(jobs[0].out, jobs[t].out, OUT_BYTES)) return 3; /* it saw the first's input */
    return 0;
}
"""

SANITIZED = """
import sys
import numpy as np
from featherweight.compiler import Session
from featherweight.compiler.driver import random_inputs
session = Session(sys.argv[1])
for seed in range(2):
    assert all(np.isfinite(y).all() for y in session.run(None, random_inputs(session, seed)))
"""


def bytes_network(path):
    b = Builder()
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.op("Relu", b.conv(x, 32, 3, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1])), 0.03, 0)
    x = b.through_bytes(b.conv(x, 32, 1, 5, 5, group=32, pads=[2, 2, 2, 2]), 0.04, 100)
    x = b.through_bytes(b.op("HardSwish", b.through_bytes(b.conv(x, 64, 32, 1, 1), 0.2, 120)), 0.1, 10)
    return b.save(path, x, {"x": [1, 3, 32, 32]}, [1, 64, 16, 16])


def loops_network(path):
    nodes = [
        node("Resize", ["x", "", "scales"], ["r"], mode="linear"),
        node("Softmax", ["r"], ["s"], axis=1),
        node("MatMul", ["s", "s"], ["m"]),
        node("CumSum", ["m", "axis"], ["c"]),
        node("ReduceMean", ["c", "axes"], ["d"]),
    ]
    constants = {"scales": np.float32([1, 1, 2, 2]), "axis": np.array(2), "axes": np.array([3])}
    return save(make_model(nodes, {"x": [1, 3, 8, 8]}, {"d": [1, 3, 16, 1]}, constants), path)


NETWORKS = {
    "floats": lambda path: save(tiny_convnet(1), path),
    "bytes": bytes_network,
    "loops": loops_network,
}


@pytest.fixture(scope="module", params=NETWORKS)
def sources(request, tmp_path_factory):
    """The file and a folder with its C for one thread and for three."""
    folder = tmp_path_factory.mktemp(request.param)
    path = NETWORKS[request.param](folder / "net.onnx")
    for threads in (1, 3):
        write_files(generate(path, target_named("native"), threads=threads), folder / str(threads), threads)
    return folder


def compiled_object(folder, *extra):
    target = target_named("native")
    command = [find_compiler(target), *COMMON, "-O1", *target.flags, "-fPIC", *extra, "-c", "model.c"]
    subprocess.run([*command, "-o", "model.o"], cwd=folder, check=True)
    return folder / "model.o"


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm: apt install binutils")
@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_called_that_allocates(sources, threads):
    path = compiled_object(sources / str(threads))
    listed = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True).stdout
    used = {line.split()[-1] for line in listed.splitlines()} - ALLOWED - (TEAM if threads > 1 else set())
    library = subprocess.run(
        [find_compiler(target_named("native")), "-print-file-name=libm.so.6"], capture_output=True, text=True
    ).stdout.strip()
    exported = subprocess.run(["nm", "-D", library], capture_output=True, text=True).stdout
    assert used - {line.split()[-1].split("@")[0] for line in exported.splitlines()} == set()


@pytest.mark.skipif(shutil.which("size") is None, reason="no size: apt install binutils")
@pytest.mark.parametrize("threads", [1, 3])
def test_there_is_no_mutable_state(sources, threads):
    path = compiled_object(sources / str(threads))
    listed = subprocess.run(["size", "-A", "-d", path], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines() if line.startswith(".")]
    sizes = {name: int(size) for name, size, _ in rows}
    assert sizes[".text"] > 0
    mutable = {
        name: size for name, size in sizes.items() if name.startswith((".data", ".bss", ".tdata", ".tbss"))
    }
    # Pointers in constants wait there for the loader, which then makes them read-only.
    assert not [name for name, size in mutable.items() if size and not name.startswith(".data.rel.ro")]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sanitizer", ["none", "thread"])
def test_contexts_run_side_by_side(sources, threads, sanitizer):
    folder = sources / str(threads)
    (folder / "race.c").write_text(RACE)
    report = generate(sources / "net.onnx", target_named("native")).description
    sizes = [
        f"-D{side}_BYTES={np.prod(report[kind][0]['shape']) * 4}"
        for side, kind in (("IN", "inputs"), ("OUT", "outputs"))
    ]
    target = target_named("native")
    flags = ["-fsanitize=thread", "-g"] if sanitizer == "thread" else []
    command = [find_compiler(target), "-O1", *target.flags, *flags, *sizes, "-pthread", "race.c", "model.c"]
    done = subprocess.run([*command, "-lm", "-o", "race"], cwd=folder, capture_output=True, text=True)
    if done.returncode and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["./race", "model.weights"], cwd=folder, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def sanitized(path, folder, target):
    """Run a network under AddressSanitizer and UBSan, and return what they say."""
    machine = target_named(target)
    if not runs_on_this_machine(machine):
        pytest.skip(f"this machine has no {target}")
    command = [find_compiler(machine), "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler has no AddressSanitizer")
    write_files(generate(path, machine), folder)
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover", "-O1", "-g1"]
    build_library([folder / "model.c"], folder / "libmodel.so", machine, extra=flags)
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    words = [sys.executable, "-c", SANITIZED, str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["bytes", "loops"])
def test_sanitizers_find_nothing(name, tmp_path):
    path = NETWORKS[name](tmp_path / "net.onnx")
    assert sanitized(path, tmp_path / "out", "native") == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["native", "x86-64-v4", "x86-64-v3", "generic-c"])
@pytest.mark.parametrize("kind", ["floats", "bytes"])
@pytest.mark.parametrize(
    "name", ["mobilenetv2_035", "ghostnetv2_100", "shufflenetv2_050", "inceptionnext_atto"]
)
def test_sanitizers_find_nothing_in_networks(name, kind, target, tmp_path):
    path = tmp_path / "net.onnx"
    export(name, 64, path)
    if kind == "bytes":
        images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
        path = Path(quantize_onnx(path, tmp_path / "net.int8.onnx", images))
    assert sanitized(path, tmp_path / "out", target) == (0, "")
