"""What a task keeps between the trials of a search."""

import numpy as np
import pytest
import torch

from featherweight.data.sources import load_dataset
from featherweight.workflows import training
from featherweight.workflows.training import make_task


@pytest.fixture(scope="module")
def task():
    return make_task(load_dataset("digits"))


def test_a_side_is_decoded_once(task):
    first = task.arrays(task.dataset.train, 8)
    assert task.arrays(task.dataset.train, 8) is first
    assert np.array_equal(first.images.numpy(), task.dataset.train.decode((8, 8), "L"))
    assert torch.equal(first.labels, torch.from_numpy(task.dataset.train.labels))


def test_splits_and_sides_are_kept_apart(task):
    assert len(task.arrays(task.dataset.val, 8)) == len(task.dataset.val)
    assert task.arrays(task.dataset.train, 16).images.shape[1:] == (16, 16, 1)


def test_no_more_is_kept_than_allowed(monkeypatch):
    task = make_task(load_dataset("digits"))
    monkeypatch.setattr(training, "_KEPT_BYTES", 0)
    first = task.arrays(task.dataset.train, 8)
    task.arrays(task.dataset.train, 16)
    assert task.arrays(task.dataset.train, 8) is not first
