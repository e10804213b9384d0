"""The examples run as they stand, each for a few real steps, and the plain loop's loss is that of plain log-probs."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_pairs, make_tiny_model, plain_logps
from transformers import AutoModelForCausalLM

from mopo_kernels import mopo_objective

EXAMPLES = Path(__file__).parents[3] / "examples"
HELD = ["friendly", "brief", "0.4"]


@pytest.fixture(scope="module")
def given(tmp_path_factory, tokenizer):
    """A model and rows on disk."""
    folder = tmp_path_factory.mktemp("given")
    make_tiny_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in make_pairs()))
    return str(folder / "model"), str(folder / "rows.jsonl")


def run(name, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    return runpy.run_path(str(EXAMPLES / name))


def test_the_plain_loop(given, monkeypatch, tmp_path, capsys):
    scope = run("accelerate_loop.py", [*given, *HELD], monkeypatch, tmp_path)
    assert capsys.readouterr().out.count("loss ") == 4  # eight groups, two at a time
    with torch.no_grad():  # the last batch once more, by the trained model
        ids, target, win_rate, group = scope["ids"], scope["target"], scope["labelled"], scope["of"]
        sequences = []
        for tokens, kept in zip(ids, target != -100, strict=True):
            places = kept.nonzero()[:, 0]
            sequences.append((tokens[: int(places[-1]) + 2].tolist(), int(places[0]) + 1))
        logp = plain_logps(scope["accelerator"].unwrap_model(scope["model"]), sequences)
        expected = mopo_objective(logp, win_rate.double(), group, scope["dual"].multipliers, tau=0.08).loss
        hidden = scope["model"](ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, :-1]
        found = scope["mopo_loss"](
            hidden, scope["head"], target, win_rate, group, scope["dual"].multipliers.float(), tau=0.08
        ).loss
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_plain_loop_in_two_processes(given, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "accelerate_loop.py"), *given, *HELD]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 4  # eight groups: two batches of two for each of the two


def test_transformers_trainer(given, monkeypatch, tmp_path):
    scope = run("transformers_trainer.py", [*given, *HELD], monkeypatch, tmp_path)
    start = AutoModelForCausalLM.from_pretrained(given[0])
    assert not torch.equal(scope["model"].lm_head.weight.cpu(), start.lm_head.weight)


def test_lightning(given, monkeypatch, tmp_path):
    pytest.importorskip("lightning")
    scope = run("lightning_module.py", [*given, *HELD], monkeypatch, tmp_path)
    assert scope["trainer"].global_step == 4  # eight groups, two at a time
    module = scope["module"]
    start = AutoModelForCausalLM.from_pretrained(given[0])
    assert not torch.equal(module.model.lm_head.weight.cpu(), start.lm_head.weight)
    with torch.no_grad():
        batch = scope["collate"]([0, 3])
        logp = plain_logps(module.model, [scope["rows"][i] for i in (0, 1, 6, 7)])
        expected = mopo_objective(logp, batch[2].double(), batch[3], scope["dual"].multipliers, tau=0.08).loss
        found = module.training_step(batch, 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_trls_script(given, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    arguments = ["--model_name_or_path", given[0], "--dataset_name", given[1], "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_steps", "2", "--use_cpu", "--bf16", "False", "--report_to", "none", "--use_peft"]
    arguments += ["--primary", "friendly", "--held", "brief", "--threshold", "0.4"]
    scope = run("trl_dpo.py", arguments, monkeypatch, tmp_path)
    assert scope["trainer"].state.global_step == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_trls_online_script(given, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    arguments = ["--model_name_or_path", given[0], "--dataset_name", given[1], "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_steps", "3", "--use_cpu", "--bf16", "False", "--report_to", "none", "--logging_steps", "1"]
    arguments += ["--num_generations", "4", "--max_completion_length", "16", "--scale_rewards", "none"]
    trainer = run("trl_grpo.py", arguments, monkeypatch, tmp_path)["trainer"]
    assert trainer.state.global_step == 3
    first, second = trainer.state.log_history[:2]
    assert first["win_rate/brevity"] == pytest.approx(0.5, abs=0.35)  # the initial model against itself
    assert second["multiplier/brevity"] == pytest.approx(max(0, -0.1 * first["slack/brevity"]))


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path
