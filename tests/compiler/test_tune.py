"""Tuning: what is measured, kept and chosen, and the cut that chooses planar regions."""

import itertools
import json

import numpy as np
import onnxruntime
import pytest
import test_layers
from onnx_files import save

from featherweight.compiler import compile_onnx, tune
from featherweight.compiler.alternatives import Alternatives
from featherweight.compiler.driver import random_inputs
from featherweight.compiler.passes.cut import cheapest_labels


def test_tuning_measures_forms_and_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "REPEATS", 2)
    for maker in (test_layers.sparse_layers, test_layers.dense_3x3, test_layers.inverted_residuals):
        path = save(maker(), tmp_path / "net.onnx")
        sources = []
        for _ in range(2):
            session = compile_onnx(path, tmp_path / "out", tune=True)
            sources.append((tmp_path / "out/model.c").read_text())
        assert sources[0] == sources[1]
        feeds = random_inputs(session)
        reference = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for got, expected in zip(session.run(None, feeds), reference.run(None, feeds), strict=True):
            assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    (store,) = (tmp_path / "cache/compiler").glob("measured-*.json")
    kept = json.loads(store.read_text())
    keys = kept["seconds"]
    for prefix, forms in (
        ("block-", ("fused", "apart")),
        ("3x3-", ("winograd", "direct")),
        ("1x1-", ("dense",)),
    ):
        for form in forms:
            assert any(key.startswith(prefix) and key.endswith(form) for key in keys), (prefix, form)
    # Two shares of zeros: the layer's own, and with half of its nonzeros.
    assert len({key for key in keys if key.startswith("1x1-") and "-z" in key}) >= 4
    compile_onnx(save(test_layers.sparse_layers(), tmp_path / "net.onnx"), tmp_path / "out", tune=True)
    layers = json.loads((tmp_path / "out/report.json").read_text())["layers"]
    found = [layer for layer in layers if "break_even_zeros" in layer]
    assert found and all(0 <= layer["break_even_zeros"] <= 1 for layer in found)
    assert any(layer["break_even_by"] == "measured" for layer in found)


@pytest.mark.parametrize("text", ["", "[1]", '{"tiles": 3}', '{"tiles": {"a": [1]}, "seconds": {}}'])
def test_a_damaged_cache_counts_as_empty(text, tmp_path):
    (tmp_path / "store.json").write_text(text)
    assert tune.load(tmp_path / "store.json") == tune.Measured()


def test_measured_forms_overrule_the_model():
    known = Alternatives({"a": 1.0, "b": 2.0})
    assert known.prefers("a", "b", modelled=False) and not known.prefers("b", "a", modelled=True)
    assert known.prefers("c", "a", modelled=True) and not known.prefers("c", "a", modelled=False)


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_cheapest_labelling(seed):
    rng = np.random.default_rng(seed)
    items = range(7)
    costs = {item: tuple(rng.integers(0, 10, 2).astype(float)) for item in items}
    edges = [(int(a), int(b), float(rng.integers(0, 6))) for a, b in rng.integers(0, 7, (12, 2)) if a != b]

    def price(chosen):
        own = sum(costs[item][item in chosen] for item in items)
        return own + sum(cost for a, b, cost in edges if (a in chosen) != (b in chosen))

    every = itertools.chain.from_iterable(itertools.combinations(items, size) for size in range(8))
    assert price(cheapest_labels(costs, edges)) == pytest.approx(min(price(set(some)) for some in every))
