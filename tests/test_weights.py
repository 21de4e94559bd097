"""Tests of reading, fetching and loading weights; the only server is one on this machine."""

import functools
import hashlib
import http.server
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from featherweight import weights
from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct
from featherweight.cards import Variant, Weights
from featherweight.errors import CheckpointError, UsageError


def tiny_net(num_classes: int = 4, in_chans: int = 3) -> Classifier:
    body = nn.Sequential(ConvNormAct(in_chans, 8, 3, 2))
    return Classifier(body, [(8, 2)], 8, num_classes=num_classes, in_chans=in_chans)


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves one folder; knows ranges, and can break a download in the middle."""

    seen: list = []  # noqa: RUF012
    break_after: int | None = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        header = self.headers.get("Range")
        type(self).seen.append(header)
        start = int(header.removeprefix("bytes=").rstrip("-")) if header else 0
        if header and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if header else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = type(self).break_after or len(content)
        type(self).break_after = None
        self.wfile.write(content[start:end])


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (RangeHandler,), {"seen": [], "break_after": None})
    httpd = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}", handler
    httpd.shutdown()
    httpd.server_close()


def test_safetensors_and_torch_files_load_alike(tmp_path):
    net = tiny_net()
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        other = tiny_net()
        weights.load_checkpoint(other, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_plain_module_loads_too(tmp_path):
    layer = nn.Linear(2, 2)
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    other = nn.Linear(2, 2)
    weights.load_checkpoint(other, tmp_path / "a.safetensors")
    assert torch.equal(layer.weight, other.weight)
    with pytest.raises(CheckpointError, match="does not fit"):
        weights.load_checkpoint(nn.Linear(3, 2), tmp_path / "a.safetensors")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"weights": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="could run code"):
            weights.read_state_dict(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt", "empty.pt", "noise.pt"])
def test_corrupt_files_are_named(tmp_path, name):
    path = tmp_path / name
    if name == "cut.safetensors":
        save_file(tiny_net().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-40])
    elif name == "cut.pt":
        torch.save(tiny_net().state_dict(), path)
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.write_bytes(b"" if name == "empty.pt" else b"\x93\x00 no checkpoint")
    with pytest.raises(CheckpointError, match=name):
        weights.read_state_dict(path)


def test_missing_file_and_foreign_content(tmp_path):
    with pytest.raises(CheckpointError, match="No checkpoint"):
        weights.read_state_dict(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        weights.read_state_dict(tmp_path / "list.pt")


def test_download_resumes_and_is_kept(server):
    folder, address, handler = server
    content = bytes(range(256)) * 40
    (folder / "w.bin").write_bytes(content)
    entry = Weights(f"{address}/w.bin", "own", hashlib.sha256(content).hexdigest()[:10])
    handler.break_after = 3000
    with pytest.raises(CheckpointError, match="3000 of 10240"):
        weights.fetch_weights(entry)
    seen = []
    path = weights.fetch_weights(entry, lambda have, total: seen.append((have, total)))
    assert path.read_bytes() == content
    assert handler.seen == [None, "bytes=3000-"] and seen[-1] == (10240, 10240)
    weights.fetch_weights(entry)
    assert len(handler.seen) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_complete_part_is_accepted(server):
    folder, address, _ = server
    (folder / "w.bin").write_bytes(b"all of it")
    entry = Weights(f"{address}/w.bin", "own")
    path = weights.fetch_weights(entry)
    path.rename(path.with_name(path.name + ".part"))
    assert weights.fetch_weights(entry).read_bytes() == b"all of it"


def test_wrong_checksum_is_thrown_away(server):
    folder, address, _ = server
    (folder / "w.bin").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="SHA-256"):
        weights.fetch_weights(Weights(f"{address}/w.bin", "own", "00" * 32))
    assert not list(weights.cache_folder("weights").rglob("*w.bin*"))


def test_offline_uses_the_cache_only(server, monkeypatch):
    folder, address, handler = server
    (folder / "w.bin").write_bytes(b"1")
    entry = Weights(f"{address}/w.bin", "own")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        weights.fetch_weights(entry)
    assert handler.seen == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    weights.fetch_weights(entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights.fetch_weights(entry).read_bytes() == b"1"


def test_unreachable_address_is_one_clear_line(server):
    _, address, _ = server
    with pytest.raises(CheckpointError, match="Check the connection") as caught:
        weights.fetch_weights(Weights("http://127.0.0.1:9/none.bin", "own"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="Cannot fetch"):
        weights.fetch_weights(Weights(f"{address}/../x", "own"))


def test_pretrained_adapts_classes_and_channels(server):
    folder, address, _ = server
    net = tiny_net()
    save_file(net.state_dict(), folder / "w.safetensors")
    sources = (
        Weights(f"{address}/gone.safetensors", "own"),
        Weights((folder / "w.safetensors").as_uri(), "own"),
    )
    variant = Variant("tiny", weights=sources)
    same, grey, more = tiny_net(), tiny_net(7, 1), tiny_net(0, 5)
    for other in (same, grey, more):
        weights.load_pretrained(other, variant)
    assert torch.equal(same.classifier.weight, net.classifier.weight)
    assert grey.classifier.weight.shape == (7, 8)
    x = torch.rand(2, 1, 8, 8)
    net.eval(), grey.eval()
    torch.testing.assert_close(grey.forward_features(x), net.forward_features(x.expand(-1, 3, -1, -1)))
    assert more.body[0].conv.weight.shape == (8, 5, 3, 3)


def test_pretrained_without_sources():
    with pytest.raises(UsageError, match="no published weights"):
        weights.load_pretrained(tiny_net(), Variant("tiny"))


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"stem.weight": torch.zeros(3), "x": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        weights.load_checkpoint(tiny_net(), tmp_path / "a.safetensors")
    save_file(tiny_net(5).state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"classifier.weight \(5, 8\) for \(4, 8\)"):
        weights.load_checkpoint(tiny_net(), tmp_path / "b.safetensors")


def test_official_weights_from_a_file_or_a_checkpoint(tmp_path):
    net = tiny_net(5)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    for source in (tmp_path / "net.pth", str(tmp_path / "net.pth"), {"model": net.state_dict()}):
        loaded = weights.load_official(tiny_net(5), source)
        assert torch.equal(loaded.classifier.weight, net.classifier.weight)
    with pytest.raises(UsageError, match="no official weights"):
        weights.load_official(torch.nn.Linear(2, 2), tmp_path / "net.pth")
