"""The loop as a user meets it: learning, exact resume after kill -9, interruption, several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import digits, jitter, tiny_net
from torch import nn

from featherweight.errors import CheckpointError, UsageError
from featherweight.train import checkpoint
from featherweight.train.loop import evaluate, fit_model
from featherweight.train.recipe import Recipe

CHILD = Path(__file__).with_name("child_train.py")
SOURCE = Path(__file__).parents[2] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def data():
    return digits()


def quick(**changes) -> Recipe:
    settings = {"epochs": 4, "batch_size": 32, "lr": 0.05, "bf16": False, "eval_every": 1, "threads": 1}
    return Recipe(**{**settings, **changes})


def start(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(CHILD), str(out), *options]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_child(out: Path, *options: str) -> list[float]:
    child = start(out, *options)
    stdout, stderr = child.communicate(timeout=200)
    assert child.returncode == 0, stderr
    return json.loads(stdout.strip().splitlines()[-1])


def kill_and_resume(tmp_path: Path, kills: int, *options: str) -> None:
    """Kill a job `kills` times at random moments, finish it, and compare with an undisturbed one."""
    calm_losses = run_child(tmp_path / "calm", *options)
    rng, out = random.Random(7), tmp_path / "killed"
    for _ in range(kills):
        child = start(out, "resume=1", *options)
        while not (out / "state.json").exists() and child.poll() is None:
            time.sleep(0.01)
        # Start-up (imports) takes far longer than the steps: strike after the state has begun to move.
        before = steps_done(out)
        while steps_done(out) == before and child.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.15)
        assert child.poll() is None, f"ended before the kill; needs more epochs\n{child.stderr.read()}"
        child.kill()
        child.communicate()
    assert run_child(out, "resume=1", *options) == calm_losses
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "calm/model.safetensors").read_bytes()
    epochs = [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(calm_losses) + 1))


def steps_done(out: Path) -> str:
    """Return the newest state file's name."""
    return max((path.name for path in out.glob("state-*.safetensors")), default="")


def test_kill_nine_and_resume_gives_the_same_bytes(tmp_path):
    kill_and_resume(tmp_path, 4, "epochs=40", "mixup=0.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("epochs=150", "mixup=0.2"), ("epochs=150", "optimizer=adamw", "lr=0.003", "bf16=1")]
)
def test_twenty_kills(tmp_path, options):
    kill_and_resume(tmp_path, 20, *options)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "adamw", "lr": 0.003}, {"bf16": True, "ema_decay": None}]
)
def test_interrupted_at_every_kind_of_step_resumes_exactly(tmp_path, data, changes):
    recipe = quick(epochs=2.5, mixup=0.3, checkpoint_every_s=0, **changes)
    calm = tiny_net()
    reference = fit_model(calm, *data, recipe, jitter, tmp_path / "calm")
    for stop_at in (1, 10, 14):

        def interrupt(event, stop_at=stop_at):
            if event["event"] == "checkpoint" and event["step"] == stop_at:
                raise KeyboardInterrupt

        out = tmp_path / f"stop{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            fit_model(tiny_net(), *data, recipe, jitter, out, progress=interrupt)
        resumed = tiny_net()
        result = fit_model(resumed, *data, recipe, jitter, out, resume=True)
        for name, tensor in calm.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), (stop_at, name)
        timeless = [{**line, "wall_s": 0} for line in result.history]
        assert timeless == [{**line, "wall_s": 0} for line in reference.history]


def test_ctrl_c_writes_a_state_at_the_step_where_it_came(tmp_path, data):
    before = signal.getsignal(signal.SIGINT)  # a job in the background starts with it ignored

    def press(event):
        if event["event"] == "epoch" and event["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit_model(tiny_net(), *data, quick(checkpoint_every_s=1e9), None, tmp_path, progress=press)
    assert checkpoint.load_state(tmp_path).step in (20, 21)
    assert signal.getsignal(signal.SIGINT) is before


def test_learns_and_leaves_the_averaged_weights_in_the_model(tmp_path):
    train, val = digits(1400)
    model = tiny_net()
    result = fit_model(model, train, val, quick(epochs=12, lr=0.1), None, tmp_path)
    accuracy = (evaluate(model, val).argmax(1) == val.labels.numpy()).mean()
    assert accuracy == result.val_accuracy > 0.85
    assert result.steps == 12 * (1400 // 32) and len(result.history) == 12
    stored = checkpoint.load_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_time_budget_becomes_a_stored_number_of_steps(tmp_path, data):
    result = fit_model(tiny_net(), *data, quick(epochs=None, time_budget_s=3.0), None, tmp_path)
    assert result.steps > 10 and result.wall_s > 0.5
    assert checkpoint.load_state(tmp_path).scalars["plan"]["total_steps"] == result.steps


def test_resume_refuses_another_recipe_or_other_data(tmp_path, data):
    fit_model(tiny_net(), *data, quick(epochs=1), None, tmp_path)
    with pytest.raises(CheckpointError, match=r"lr: 0\.05 -> 0\.1"):
        fit_model(tiny_net(), *data, quick(epochs=1, lr=0.1), None, tmp_path, resume=True)
    train, val = digits(300)
    with pytest.raises(CheckpointError, match="data"):
        fit_model(tiny_net(), train, val, quick(epochs=1), None, tmp_path, resume=True)


def test_a_corrupt_newest_state_resumes_from_the_one_before(tmp_path, data, caplog):
    calm = tiny_net()
    recipe = quick(epochs=2, checkpoint_every_s=0)
    fit_model(calm, *data, recipe, None, tmp_path)
    newest = tmp_path / steps_done(tmp_path)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    resumed = tiny_net()
    fit_model(resumed, *data, recipe, None, tmp_path, resume=True)
    assert "SHA-256" in caplog.text
    for name, tensor in calm.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_divergence_is_said_in_one_line(tmp_path, data):
    broken = tiny_net()
    nn.init.constant_(broken[0].weight, float("inf"))
    with pytest.raises(UsageError, match="diverged"):
        fit_model(broken, *data, quick(), None, tmp_path)


def test_a_teacher_pulls_the_student_to_its_answers(tmp_path, data):
    teacher = tiny_net()
    fit_model(teacher, *data, quick(epochs=10, ema_decay=None), None, tmp_path / "teacher")
    gaps = []
    for alpha in (0.0, 1.0):
        torch.manual_seed(3)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        recipe = quick(epochs=10, ema_decay=None, distill_alpha=alpha)
        fit_model(student, *data, recipe, None, tmp_path / f"a{alpha}", teacher=teacher)
        gaps.append(np.abs(evaluate(student, data[1]) - evaluate(teacher, data[1])).mean())
    assert gaps[1] < gaps[0]


def test_the_callers_random_stream_and_threads_are_left_alone(tmp_path, data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.manual_seed(5)
    fit_model(model, *data, quick(epochs=1), jitter, tmp_path)
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


@pytest.mark.parametrize("launcher", ["torchrun", "devices"])
def test_two_processes_follow_one_with_twice_the_batch(tmp_path, launcher):
    common = ("plain=1", "epochs=3")
    alone = run_child(tmp_path / "one", "batch=32", *common)
    if launcher == "devices":
        pair = run_child(tmp_path / "two", "batch=16", "devices=2", *common)
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, str(CHILD), str(tmp_path / "two"), "batch=16", "devices=2", *common]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        pair = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    np.testing.assert_allclose(pair, alone, rtol=2e-4)
    one, two = (checkpoint.load_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)
