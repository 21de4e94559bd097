"""What `doctor` calls healthy and what it does not."""

import json

import pytest

from featherweight.cli.main import main
from featherweight.workflows import doctor


@pytest.mark.parametrize(
    ("pair", "healthy"),
    [
        (("2.12.1", "0.27.1"), True),
        (("2.12.1+cpu", "0.27.1+cpu"), True),
        (("2.13.0+cpu", "0.28.0"), False),
        (("2.13.0", "0.27.1"), False),
        ((None, "0.27.1"), True),
    ],
)
def test_torch_and_torchvision_must_match(pair, healthy):
    assert (doctor.check_pair(*pair) == []) is healthy


def test_this_environment_is_described(capsys):
    code = main(["doctor", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"torch", "numpy", "onnxruntime"} <= {package["name"] for package in found["packages"]}
    assert found["cpu"]["cores"] >= 1 and code == (5 if found["problems"] else 0)


def test_a_missing_package_is_a_problem(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "onnx" else real(name))
    found = doctor.examine(quick=True)
    assert any("onnx" in problem and "missing" in problem for problem in found["problems"])


def test_a_missing_extra_names_the_command(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "timm" else real(name))
    extras = {extra["name"]: extra for extra in doctor.examine(quick=True)["extras"]}
    assert extras["timm"]["state"] == "missing: timm"
    assert extras["timm"]["install"] == "pip install 'featherweight[timm]'"
