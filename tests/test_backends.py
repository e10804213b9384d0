"""The table of backends: what runs, why, and what is said when the C++ kernels are missing."""

import os
import subprocess
import sys

import pytest
import torch

from mopo_kernels import backends, linear_logprob
from mopo_kernels.backends import cpu


def test_the_cpu_kernels_are_preferred_and_say_their_instruction_set(monkeypatch):
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    if cpu.UNAVAILABLE:
        pytest.skip(cpu.UNAVAILABLE)
    assert {c.backend for c in backends.describe() if c.device == "cpu"} == {"cpu"}
    assert all(cpu.instruction_set() in c.reason for c in backends.describe() if c.device == "cpu")


def test_without_kernels_the_reference_runs_and_describe_says_why(monkeypatch):
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "UNAVAILABLE", "the C++ kernels are not built (no compiler)")
    choice = next(c for c in backends.describe() if c.device == "cpu")
    assert choice.backend == "reference"
    assert "cpu is passed over: the C++ kernels are not built" in choice.reason
    logp = linear_logprob(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 4]))
    assert logp.isfinite().all()
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run linear_logprob on cpu \(the C\+\+ kernels"):
        backends.choose("linear_logprob", "cpu", "cpu")


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("MOPO_BACKEND", "reference")
    assert backends.choose("linear_logprob", "cpu").backend == "reference"
    monkeypatch.setenv("MOPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MOPO_BACKEND='nonsense' cannot run linear_logprob on cpu"):
        backends.choose("linear_logprob", "cpu")


@pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)
def test_an_instruction_set_can_be_asked_for():
    program = "from mopo_kernels.backends import cpu; print(cpu.instruction_set(), cpu.MULTIPLIES_BFLOAT16)"
    environment = {**os.environ, "MOPO_CPU_ISA": "portable"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["portable", "False"]
