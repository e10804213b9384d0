"""`mopo doctor`: what counts as a problem, and what it prints."""

import json

import pytest
import torch

from mopo_trainer.commands import doctor


def test_everything_needed_is_here(capsys):
    assert doctor.run_doctor(as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert {package["name"]: package["status"] for package in found["packages"]}["transformers"] == "ok"
    assert found["cpu"]["cores"] >= 1
    ops = {(row["op"], row["device"]) for row in found["backends"]}
    assert {("linear_logprob", "cpu"), ("token_logprob", "cpu")} <= ops
    assert all(row["backend"] and row["reason"] for row in found["backends"])


def test_what_is_needed_comes_from_the_distribution_itself():
    required = {package.name: package.required for package in doctor.packages()}
    assert list(required)[:2] == ["torch", "transformers"]
    assert required["peft"]
    assert not required["gguf"]
    assert not required["triton"]
    assert "pytest" not in required


@pytest.mark.parametrize(("version", "status"), [(None, "missing"), ("4.9.1", "older than 5.0")])
def test_a_package_that_training_needs_decides_the_exit_code(monkeypatch, capsys, version, status):
    installed = doctor._installed_version
    monkeypatch.setattr(
        doctor, "_installed_version", lambda name: version if name == "transformers" else installed(name)
    )
    assert doctor.run_doctor() == 1
    printed = capsys.readouterr().out
    assert f"problem: transformers is {status}" in printed
    assert "pip install 'mopo-kernels[trainer]'" in printed


def test_an_optional_package_does_not(monkeypatch, capsys):
    installed = doctor._installed_version
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None if name == "triton" else installed(name))
    assert doctor.run_doctor() == 0
    assert "Ready" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("installed", "needed", "enough"),
    [
        ("2.13.0+cpu", "2.9", True),
        ("2.9", "2.9", True),
        ("2.8.1", "2.9", False),
        ("3.0rc1", "2.9", True),
        ("unknown", "9", True),
    ],
)
def test_versions_compare_by_number(installed, needed, enough):
    package = doctor.Package("x", installed, needed, "tests", required=True)
    assert (package.status == "ok") is enough


def test_devices_say_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = doctor.devices()
    assert line.startswith("no GPU: torch")


def test_devices_name_each_gpu(monkeypatch):
    gpu = type("Properties", (), {"name": "Some GPU", "major": 9, "minor": 0, "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert doctor.devices() == [f"cuda:{i}  Some GPU, sm_90, 80 GiB" for i in range(2)]
