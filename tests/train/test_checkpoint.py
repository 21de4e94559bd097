"""States on disk: round trip, corruption, a full disk, pickles."""

import errno
import hashlib
import json
import os
import pickle

import pytest
import torch

from featherweight.errors import CheckpointError
from featherweight.train import checkpoint
from featherweight.train.checkpoint import load_state, load_tensors, save_state


def tensors(value: float) -> dict[str, torch.Tensor]:
    layout = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    return {"a": torch.full((50,), value), "b": layout, "n": torch.tensor(3)}


def flip_byte(path, position=-5):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_round_trip_keeps_values_and_only_two_states(tmp_path):
    for step in range(4):
        written = tensors(step)
        save_state(tmp_path, step, written, {"loss": 0.1 + 0.2, "step_list": [1, 2]})
    state = load_state(tmp_path)
    assert state.step == 3 and state.scalars == {"loss": 0.1 + 0.2, "step_list": [1, 2]}
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in written.items())
    names = sorted(path.name for path in tmp_path.iterdir())
    expected = ["state-000000002.safetensors", "state-000000003.safetensors"]
    assert names == [*expected, "state.json", "state.previous.json"]


def test_an_empty_folder_has_no_state(tmp_path):
    assert load_state(tmp_path) is None


@pytest.mark.parametrize("victim", ["tensors", "pointer", "missing", "truncated"])
def test_corruption_falls_back_to_the_state_before_with_a_warning(tmp_path, victim, caplog):
    save_state(tmp_path, 1, tensors(1), {})
    save_state(tmp_path, 2, tensors(2), {})
    newest = tmp_path / "state-000000002.safetensors"
    if victim == "pointer":
        flip_byte(tmp_path / "state.json", 30)
    elif victim == "missing":
        newest.unlink()
    elif victim == "truncated":
        newest.write_bytes(newest.read_bytes()[:40])
    else:
        flip_byte(newest)
    assert load_state(tmp_path).step == 1
    assert "Falling back" in caplog.text
    # The next save must rotate the good state, not the corrupt one, into second place.
    save_state(tmp_path, 3, tensors(3), {})
    flip_byte(tmp_path / "state-000000003.safetensors")
    assert load_state(tmp_path).step == 1


def test_both_states_corrupt_is_an_error_with_advice(tmp_path):
    save_state(tmp_path, 1, tensors(1), {})
    save_state(tmp_path, 2, tensors(2), {})
    for path in tmp_path.glob("*.safetensors"):
        flip_byte(path)
    with pytest.raises(CheckpointError, match="without --resume"):
        load_state(tmp_path)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save_state(tmp_path, 1, tensors(1), {})
    os.replace(tmp_path / "state.json", tmp_path / "state.previous.json")
    assert load_state(tmp_path).step == 1


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path):
    (tmp_path / ".state-000000000.safetensors.k1ll3d.tmp").write_bytes(b"half")
    save_state(tmp_path, 1, tensors(1), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-000000001.safetensors", "state.json"]


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
def test_a_full_disk_keeps_the_state_before_and_cleans_up(tmp_path, monkeypatch, call):
    save_state(tmp_path, 1, tensors(1), {})
    before = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, full_disk)
        with pytest.raises(CheckpointError, match=r"Disk full.*previous checkpoint is kept") as caught:
            save_state(tmp_path, 2, tensors(2), {})
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert load_state(tmp_path).step == 1


def test_a_disk_that_fills_up_between_tensors_and_pointer(tmp_path, monkeypatch):
    save_state(tmp_path, 1, tensors(1), {})
    write, calls = os.write, []

    def second_fails(handle, payload):
        calls.append(handle)
        return write(handle, payload) if len(calls) < 2 else full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "write", second_fails)
        with pytest.raises(CheckpointError, match="Disk full"):
            save_state(tmp_path, 2, tensors(2), {})
    assert load_state(tmp_path).step == 1
    assert not list(tmp_path.glob("*.tmp*"))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_bomb_is_refused_unopened(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    if kind == "torch":
        torch.save(Bomb(), path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_tensors(path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_in_place_of_a_state_is_refused_even_with_a_matching_digest(tmp_path):
    save_state(tmp_path, 1, tensors(1), {})
    bomb = pickle.dumps(Bomb())
    (tmp_path / "state-000000001.safetensors").write_bytes(bomb)
    pointer = json.loads((tmp_path / "state.json").read_text())
    pointer["body"]["sha256"] = hashlib.sha256(bomb).hexdigest()
    pointer["digest"] = checkpoint._digest(pointer["body"])
    (tmp_path / "state.json").write_text(json.dumps(pointer))
    with pytest.raises(CheckpointError, match="pickle"):
        load_state(tmp_path)


def test_a_pointer_cannot_name_a_file_outside_the_folder(tmp_path):
    folder = tmp_path / "run"
    save_state(folder, 1, tensors(1), {})
    pointer = json.loads((folder / "state.json").read_text())
    pointer["body"]["file"] = "../outside.safetensors"
    pointer["digest"] = checkpoint._digest(pointer["body"])
    (folder / "state.json").write_text(json.dumps(pointer))
    (folder / "state-000000001.safetensors").rename(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError):
        load_state(folder)
