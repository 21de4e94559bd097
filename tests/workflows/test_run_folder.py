"""The run folder: what is stored, what is refused."""

import json

import pytest

from featherweight.errors import CheckpointError, UsageError
from featherweight.workflows.run_folder import RunFolder, default_folder


def test_progress_and_wall_times_survive(tmp_path):
    first = RunFolder(tmp_path, {"seed": 1})
    with first.step("data"):
        first.save(winner="a")
    again = RunFolder(tmp_path, {"seed": 1}, resume=True)
    assert again.progress["winner"] == "a"
    assert again.spent_s == pytest.approx(first.spent_s)
    with again.step("data"):
        pass
    assert again.progress["wall_s"]["data"] >= first.progress["wall_s"]["data"]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    RunFolder(tmp_path, {"seed": 1})
    with pytest.raises(UsageError, match="--resume"):
        RunFolder(tmp_path, {"seed": 1})


def test_resuming_with_other_settings_names_them(tmp_path):
    RunFolder(tmp_path, {"seed": 1, "data": "digits"})
    with pytest.raises(UsageError, match="seed"):
        RunFolder(tmp_path, {"seed": 2, "data": "digits"}, resume=True)


def test_a_damaged_folder_is_a_checkpoint_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RunFolder(tmp_path, {}, resume=True)


def test_a_step_is_timed_even_when_it_fails(tmp_path):
    folder = RunFolder(tmp_path, {})
    with pytest.raises(ValueError), folder.step("search"):
        raise ValueError
    assert "search" in json.loads((tmp_path / "progress.json").read_text())["wall_s"]


def test_default_folders_count_up_and_resume_takes_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("pets")
    RunFolder(first, {})
    second = default_folder("pets")
    RunFolder(second, {})
    assert [first.name, second.name] == ["pets", "pets-2"]
    assert default_folder("pets", resume=True) == second
    with pytest.raises(UsageError, match="--out"):
        default_folder("birds", resume=True)
