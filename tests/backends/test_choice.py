"""The table of backends: what runs, why, and what is said when the C++ kernels are missing."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from mopo_kernels import backends, linear_logprob
from mopo_kernels.backends import native, triton
from mopo_kernels.backends.native import cpu, cuda
from mopo_kernels.backends.triton import cut


def test_the_cpu_kernels_are_preferred_and_say_their_instruction_set(monkeypatch):
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    if cpu.UNAVAILABLE:
        pytest.skip(cpu.UNAVAILABLE)
    assert {c.backend for c in backends.describe() if c.device == "cpu"} == {"cpu"}
    assert all(native.instruction_set() in c.reason for c in backends.describe() if c.device == "cpu")


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


def test_triton_is_asked_for_on_cpu_tensors_only_where_it_is_interpreted(monkeypatch):
    monkeypatch.setattr(triton, "UNAVAILABLE", "")
    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert backends.choose("label_statistics", "cpu", "triton").requested
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"cannot run label_statistics on cpu \(.* only where TRITON_INTERPRET=1\)"):
        backends.choose("label_statistics", "cpu", "triton")


def test_the_tile_engine_is_the_default_on_gpus_and_float64_is_not_cut(monkeypatch):
    for module in (cuda, triton, cut):
        monkeypatch.setattr(module, "UNAVAILABLE", "")
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    assert backends.choose("linear_logprob", "cuda").backend == "cuda"
    assert backends.choose("linear_logprob", "cuda", "cut").backend == "cut"
    with pytest.raises(ValueError, match="do not multiply float64"):
        backends.choose("linear_logprob", "cuda", "cut", torch.float64)
    with pytest.raises(
        ValueError, match=r"backend='cut' cannot run label_statistics on cuda \(no such backend for it\); choose one of"
    ):
        backends.choose("label_statistics", "cuda", "cut")
    monkeypatch.setattr(cuda, "UNAVAILABLE", "the CUDA kernels are not built")
    assert {backends.choose(op, "cuda").backend for op in backends.PREFERENCE} == {"triton"}


def test_plain_torch_on_a_gpu_is_no_secret(monkeypatch):
    for name in ("cuda", "triton", "cut"):
        monkeypatch.setattr(backends.BACKENDS[name], "UNAVAILABLE", f"no {name} here")
    monkeypatch.delenv("MOPO_BACKEND", raising=False)
    with pytest.warns(
        RuntimeWarning, match="token_logprob runs in plain torch on the GPU.*no cuda here; no triton here"
    ):
        assert backends.choose("token_logprob", "cuda").backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("token_logprob", "cuda", "reference").requested


def test_the_environment_speaks_of_the_ops_that_its_backend_has(monkeypatch):
    for module in (cuda, triton, cut):
        monkeypatch.setattr(module, "UNAVAILABLE", "")
    monkeypatch.setenv("MOPO_BACKEND", "cut")
    assert backends.choose("linear_logprob", "cuda").backend == "cut"
    assert backends.choose("label_statistics", "cuda").backend == "cuda"


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("MOPO_BACKEND", "reference")
    assert backends.choose("linear_logprob", "cpu").backend == "reference"
    monkeypatch.setenv("MOPO_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MOPO_BACKEND='nonsense' cannot run linear_logprob on cpu"):
        backends.choose("linear_logprob", "cpu")


@pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)
def test_an_instruction_set_can_be_asked_for():
    program = "import torch; from mopo_kernels.backends import native as n; "
    program += "print(n.instruction_set(), n.multiplies(torch.bfloat16))"
    environment = {**os.environ, "MOPO_CPU_ISA": "portable"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["portable", "False"]
