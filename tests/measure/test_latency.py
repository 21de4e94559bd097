"""Tests of the timings."""

import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, save

from featherweight.errors import DataError, FeatherweightError
from featherweight.measure import latency
from featherweight.measure.latency import compare, measure_latency, median_interval, summarize
from featherweight.measure.memory import peak_memory_bytes


def write_model(path, layers, width=64):
    """Write a chain of square matrix products."""
    weight = np.eye(width, dtype=np.float32).ravel()
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"]) for i in range(layers)]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("t0", f"t{layers}")
    ]
    weights = [helper.make_tensor(f"w{i}", TensorProto.FLOAT, [width, width], weight) for i in range(layers)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_summary_of_known_times():
    found = summarize([3.0, 1.0, 2.0, 100.0, 2.0], threads=2)
    assert found.p50_ms == 2.0 and found.runs == 5 and found.threads == 2
    assert found.interval[0] <= 2.0 <= found.interval[1]


def test_median_interval_covers_the_median_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval(np.sort(rng.exponential(size=60)).tolist())
        hits += low <= np.log(2) <= high
    assert 0.93 <= hits / 1000 <= 0.985


def test_a_longer_chain_is_slower_and_equal_files_may_not_differ(tmp_path):
    short = write_model(tmp_path / "short.onnx", 1)
    long = write_model(tmp_path / "long.onnx", 40, 256)
    result = compare([long, short], runs=60)
    assert result.verdict.startswith("short.onnx is ")
    assert result.latencies[0].p50_ms > result.latencies[1].p50_ms > 0


def test_overlapping_intervals_print_no_difference(monkeypatch, tmp_path):
    times = [[1.0, 1.1, 1.2, 1.3] * 20, [1.1, 1.2, 1.3, 1.0] * 20]
    monkeypatch.setattr(latency, "_time_in_turns", lambda *_: times)
    assert compare([tmp_path / "a", tmp_path / "b"]).verdict == "no difference"


def test_cache_is_used_survives_damage_and_follows_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    path = write_model(tmp_path / "m.onnx", 2)
    first = measure_latency(path, runs=5, warmup=1, cache=True)
    assert measure_latency(path, runs=5, warmup=1, cache=True) == first
    (entry,) = (tmp_path / "cache" / "latency").iterdir()
    entry.write_text("{")
    assert measure_latency(path, runs=5, warmup=1, cache=True) != first
    write_model(path, 3)
    measure_latency(path, runs=5, warmup=1, cache=True)
    assert len(list(entry.parent.iterdir())) == 2


def test_missing_and_broken_files(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for measure in (measure_latency, peak_memory_bytes):
        with pytest.raises(DataError):
            measure(tmp_path / "none.onnx")
        with pytest.raises(FeatherweightError):
            measure(tmp_path / "bad.onnx")


def test_timing_does_not_import_torch():
    code = "import sys, featherweight.measure.latency; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
