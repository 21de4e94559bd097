"""Several threads give the answers of one, run after run, and end with their session."""

import threading
from pathlib import Path

import numpy as np
import pytest
from onnx_files import make_model, node, save, tiny_convnet

from featherweight.compiler import Session, compile_onnx
from featherweight.compiler.driver import random_inputs


def helpers():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tiny_convnet(), tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_more_threads_change_nothing(path, threads, tmp_path):
    one = compile_onnx(path, tmp_path / "one", batch=3)
    many = compile_onnx(path, tmp_path / "many", batch=3, threads=threads)
    for seed in range(20):
        feeds = random_inputs(one, seed)
        assert (one.run(None, feeds)[0] == many.run(None, feeds)[0]).all()


def test_loops_of_every_kind_are_shared(tmp_path):
    """Steps that write twice, reduce or run on one thread must not race."""
    nodes = [
        node("Pad", ["x", "pads"], ["p"], mode="constant"),
        node("Softmax", ["p"], ["s"], axis=1),
        node("ReduceMax", ["s", "axis"], ["m"]),
        node("Sub", ["s", "m"], ["d"]),
        node("MatMul", ["d", "d"], ["q"]),
        node("CumSum", ["q", "zero"], ["c"]),
        node("TopK", ["c", "five"], ["y", "i"]),
    ]
    constants = {
        "pads": np.array([0, 1, 1, 0, 1, 1]),
        "axis": np.array([1]),
        "zero": np.array(0),
        "five": np.array([5]),
    }
    model = make_model(nodes, {"x": [4, 30, 30]}, {"y": [4, 32, 5]}, constants)
    file = save(model, tmp_path / "m.onnx")
    one, many = (compile_onnx(file, tmp_path / str(n), threads=n) for n in (1, 5))
    for seed in range(10):
        feeds = random_inputs(one, seed)
        assert (one.run(None, feeds)[0] == many.run(None, feeds)[0]).all()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_helpers_end_with_the_session(path, tmp_path):
    before = helpers()
    session = compile_onnx(path, tmp_path / "out", threads=4)
    assert helpers() == before + 3
    session.run(None, random_inputs(session))
    session.close()
    assert helpers() == before


def test_sessions_run_side_by_side(path, tmp_path):
    compile_onnx(path, tmp_path / "out", threads=2).close()
    sessions = [Session(tmp_path / "out") for _ in range(3)]
    feeds = [random_inputs(session, seed) for seed, session in enumerate(sessions)]
    expected = [session.run(None, feed)[0] for session, feed in zip(sessions, feeds, strict=True)]
    wrong = []

    def work(index):
        for _ in range(20):
            if not (sessions[index].run(None, feeds[index])[0] == expected[index]).all():
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_one_thread_links_no_pthread(path, tmp_path):
    compile_onnx(path, tmp_path / "out")
    assert "pthread" not in (tmp_path / "out/model.c").read_text()
