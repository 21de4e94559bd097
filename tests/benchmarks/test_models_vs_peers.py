"""The side-by-side timing of networks: peers, shared weights, rows and verdicts, on tiny settings."""

from __future__ import annotations

import csv
import importlib
import itertools
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from featherweight.errors import UsageError
from featherweight.measure.latency import summarize

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
PEER = '''
import torch
from featherweight.registry import create_model

class Wrapped(torch.nn.Module):
    """Our own network behind an answer of another form, with a marker to tell its weights."""

    def __init__(self):
        super().__init__()
        self.net = create_model("osnet_x0_25")
        torch.nn.init.constant_(self.net.head.norm.bias, 3.0)

    def forward(self, x):
        return {"out": self.net(x), "more": (self.net(x), None)}

    def state_dict(self):
        return self.net.state_dict()

def same():
    return Wrapped()

def other():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 512))

def flat():
    """Its training step wants the memory order of NCHW."""
    class Views(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(len(x), -1)[:, :3])
    return Views(torch.nn.Linear(3, 512))

def nothing():
    return 3
'''


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("models")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A function that names a peer of a checkout."""
    (tmp_path / "osnet_peer.py").write_text(PEER)
    monkeypatch.setattr("sys.path", [*importlib.import_module("sys").path])
    return lambda factory: f"{tmp_path}:osnet_peer:{factory}"


def test_turns_alternate_and_a_time_limit_leaves_five(bench):
    calls = []
    jobs = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = bench.in_turns(jobs, runs=50, threads=1, seconds=0.0)
    assert "".join(calls) == "ab" * 6
    assert {name: latency.runs for name, latency in found.items()} == {"a": 5, "b": 5}
    calls.clear()
    assert bench.in_turns(jobs, runs=2, threads=1)["a"].runs == 2 and len(calls) == 6


def test_timm_and_torchvision_are_found_by_name(bench):
    pytest.importorskip("timm")
    assert list(bench.library_peers("mobilenetv2_100")) == [
        "timm/mobilenetv2_100",
        "torchvision/mobilenet_v2",
    ]
    assert bench.library_peers("osnet_x1_0") == {}


def test_a_named_peer_is_built_from_its_folder(bench, spec):
    name, network = bench.named_peer(spec("other"))
    assert name == "osnet_peer:other" and network(torch.zeros(2, 3, 4, 4)).shape == (2, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nowhere:module:factory", "PATH is a folder"), ("module:factory", "PATH:MODULE:FACTORY")],
)
def test_a_peer_of_another_form_is_refused(bench, text, message):
    with pytest.raises(UsageError, match=message):
        bench.named_peer(text)


@pytest.mark.parametrize(("factory", "message"), [("absent", "absent"), ("nothing", "int")])
def test_a_factory_that_gives_no_network_is_refused(bench, spec, factory, message):
    with pytest.raises(UsageError, match=message):
        bench.named_peer(spec(factory))


def test_weights_are_shared_where_they_fit(bench, spec):
    peers = dict(bench.named_peer(spec(factory)) for factory in ("other", "same"))
    found = {c.name: c for c in bench.line_up("osnet_x0_25", peers, (3, 32, 32))}
    assert len(found) == 6
    assert found["osnet_peer:same nchw"].weights == "shared"
    assert float(found["osnet_peer:same nhwc"].difference) < 1e-6
    assert (found["osnet_peer:other nchw"].weights, found["osnet_peer:other nchw"].difference) == ("own", "")
    ours = found["featherweight nhwc"].network
    assert ours.head.norm.bias.unique().tolist() == [3.0]
    assert ours.body[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_layout_that_a_peer_refuses_is_left_out(bench, spec, caplog):
    peers = dict([bench.named_peer(spec("flat"))])
    found = [c.name for c in bench.line_up("osnet_x0_25", peers, (3, 32, 32))]
    assert "osnet_peer:flat nchw" in found and "osnet_peer:flat nhwc" not in found
    assert "osnet_peer:flat nhwc does not run" in caplog.text


def test_a_training_step_gives_gradients_and_keeps_the_weights(bench, spec):
    (contender, *_) = bench.line_up("osnet_x0_25", dict([bench.named_peer(spec("same"))]), (3, 32, 32))
    weight = contender.network.body[0].conv.weight
    before, weight.grad = weight.clone(), None
    contender.train(torch.randn(2, 3, 32, 32))
    assert torch.equal(weight, before) and weight.grad.abs().sum() > 0
    contender.forward(torch.randn(1, 3, 32, 32))
    assert not contender.network.training


def test_verdict_needs_intervals_that_do_not_meet(bench):
    def found(ours, peer):
        return {"featherweight nchw": summarize(ours, 1), "a:b nchw": summarize(peer, 1)}

    assert bench.verdict(found([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])) == "ours is 2.00 times as fast"
    assert bench.verdict(found([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])) == "ours is 0.50 times as fast"
    assert bench.verdict(found([1.0, 1.0, 3.0], [1.0, 2.0, 3.0])).startswith("no difference")


def test_the_program_stores_one_row_per_contender_and_cell(bench, spec, tmp_path):
    command = ["osnet_x0_25", "--peer", spec("same"), "--side", "32", "--threads", "1"]
    command += ["--batch", "1", "--batch", "2", "--runs", "1", "--out", str(tmp_path)]
    app = bench.typer.Typer()
    app.command()(bench.main)
    for _ in range(2):  # the second run replaces the rows
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.open()))
    cells = {(row["pass"], row["batch"]) for row in rows}
    assert cells == {("forward", "1"), ("forward", "2"), ("train", "2")} and len(rows) == 4 * len(cells)
    assert set(rows[0]) == set(bench.COLUMNS) and rows[0]["input"] == "3x32x32"
    assert str(tmp_path) not in path.read_text()
    for row in rows:
        assert float(row["low_ms"]) <= float(row["p50_ms"]) <= float(row["high_ms"])
    best = max(float(row["times_as_fast"]) for row in rows if row["system"] != "featherweight")
    assert best == 1.0


def test_the_clock_of_the_processor_is_for_one_thread(bench, spec, tmp_path, monkeypatch):
    app = bench.typer.Typer()
    app.command()(bench.main)
    command = ["osnet_x0_25", "--peer", spec("same"), "--clock", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--threads", "2"])
    assert result.exit_code == 2 and "one thread" in result.output
    ticks = itertools.count(0, 10**6)
    monkeypatch.setitem(bench.CLOCKS, "cpu", lambda: next(ticks))
    assert bench.in_turns({"a": list}, 3, 1, clock="cpu")["a"].p50_ms == 1.0


def test_without_a_peer_the_program_asks_for_one(bench, tmp_path):
    app = bench.typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["osnet_x0_25", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--peer" in result.output
