"""A step is the same by one process, by two, by accumulation and with split weights: losses, multipliers, metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import distributed_run
import pytest
import torch
from processes import together
from safetensors.torch import load_file
from tiny import make_tiny_model, make_tokenizer

from mopo_trainer.training.adapter import ADAPTER_FILE

RUN = Path(distributed_run.__file__)
CONFIGURATIONS = RUN.parents[2] / "examples" / "accelerate"
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
NOT_COMPARED = {"tokens_per_second", "epoch"}  # of an epoch's last step transformers counts micro-batches


def history(directory):
    found = json.loads((directory / "history.json").read_text())
    return [*found["steps"], found["eval"]]


def assert_same(found, expected, **tolerance):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for key in b.keys() - NOT_COMPARED:
            assert a[key] == pytest.approx(b[key], **({"rel": 2e-6, "abs": 2e-6} | tolerance)), key


def assert_ranks_agree(directory, model):
    duals = [json.loads((directory / f"dual-{rank}.json").read_text()) for rank in range(2)]
    assert duals[0] == duals[1]
    assert model in duals[0]["model"]


def pair(rank, directory):
    """DDP, then FSDP2, in the same two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    distributed_run.engines_on_cpus()
    distributed_run.train(directory / "ddp", 4, 1, **ADAM)
    distributed_run.forget_engine()
    split = {"USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {f"{'ACCELERATE_' if name == 'USE_FSDP' else ''}{name}": value for name, value in split.items()}
    distributed_run.train(directory / "fsdp2", 4, 1, **ADAM)


def test_two_processes_and_split_weights_are_one_process(tmp_path):
    distributed_run.train(tmp_path / "one", 8, 1, **ADAM)
    together(pair, tmp_path, tmp_path)
    one = history(tmp_path / "one")
    assert len(one) == 5
    assert len({step["multiplier/brief"] for step in one[:-1]}) == 4
    for engine, model in (("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPLlama")):
        assert_same(history(tmp_path / engine), one)
        assert_ranks_agree(tmp_path / engine, model)


# ----------------------------------------------------------------------------------------------- by accelerate launch


def launch(directory, configuration, groups_a_batch=4, accumulation=1, **options):
    """Two processes, started as the documentation says."""
    script = [str(RUN), str(directory), str(groups_a_batch), str(accumulation), json.dumps(options)]
    config = ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", "2", *script]
    return subprocess.Popen(
        command,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """Its exit code and what it said, within three minutes: nobody waits for a rank that is gone."""
    try:
        _, said = process.communicate(timeout=180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


WRAPPER = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlama"} | dict.fromkeys(
    ("deepspeed_zero2", "deepspeed_zero3"), "DeepSpeedEngine"
)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def assert_same_weights(directory, expected, name="model.safetensors"):
    found, wanted = load_file(directory / "checkpoint-4" / name), load_file(expected / "checkpoint-4" / name)
    assert wanted.keys() <= found.keys()  # ZeRO-2 writes a tied head twice
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration", [pytest.param(name, marks=needs_deepspeed if "deepspeed" in name else ()) for name in WRAPPER]
)
def test_shipped_configurations_train_as_one_process_and_resume(tmp_path, configuration):
    options = {**ADAM, "save_strategy": "steps", "save_steps": 2}
    distributed_run.train(tmp_path / "one", 8, 1, **options)
    code, said = finish(launch(tmp_path / "two", configuration, **options))
    assert code == 0, said
    whole = history(tmp_path / "two")
    assert_same(whole, history(tmp_path / "one"))
    assert_ranks_agree(tmp_path / "two", WRAPPER[configuration])
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    kept = (tmp_path / "two" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    code, said = finish(launch(tmp_path / "resumed", configuration, **options, resume=str(kept)))
    assert code == 0, said
    assert_same(history(tmp_path / "resumed"), whole, rel=0, abs=0)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the first checkpoint, not the last
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration", ["ddp", *(pytest.param(f"deepspeed_zero{i}", marks=needs_deepspeed) for i in (2, 3))]
)
def test_an_untied_head_and_the_best_checkpoint(tmp_path, configuration):
    """All processes end with the best checkpoint's weights; the last one's equal one process's.

    The model comes from its path, where ZeRO-3 splits it as it is loaded, and two processes accumulate twice.
    """
    model = make_tiny_model(make_tokenizer())
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())  # moved by its own gradient alone
    model.save_pretrained(tmp_path / "model")
    options = {**ADAM, **BEST, "save_strategy": "steps", "model": str(tmp_path / "model"), "evaluate_first": True}
    distributed_run.train(tmp_path / "one", 8, 1, **options)
    code, said = finish(launch(tmp_path / "two", configuration, 2, 2, **options))
    assert code == 0, said
    assert "Could not locate the best model" not in said
    duals = [json.loads((tmp_path / "two" / f"dual-{rank}.json").read_text()) for rank in range(2)]
    assert [dual["was_split"] for dual in duals] == [configuration == "deepspeed_zero3"] * 2
    assert_same(history(tmp_path / "two"), history(tmp_path / "one"))
    assert_same_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@needs_deepspeed
def test_an_adapter_under_zero_2_and_its_start(tmp_path):
    """A resumed run measures against the adapter that its run started from, not the one it is given."""
    options = {**ADAM, "save_strategy": "steps", "save_steps": 2, "lora_r": 4, "data_seed": 0}
    distributed_run.train(tmp_path / "one", 8, 1, **options)
    code, said = finish(launch(tmp_path / "two", "deepspeed_zero2", **options))
    assert code == 0, said
    assert_same(history(tmp_path / "two"), history(tmp_path / "one"))
    assert_same_weights(tmp_path / "two", tmp_path / "one", ADAPTER_FILE)
    kept = (tmp_path / "two" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    code, said = finish(launch(tmp_path / "resumed", "deepspeed_zero2", **options, resume=str(kept), seed=1))
    assert code == 0, said
    assert history(tmp_path / "resumed")[-1] == history(tmp_path / "two")[-1]
    assert_same_weights(tmp_path / "resumed", tmp_path / "two", ADAPTER_FILE)


@pytest.mark.slow
@pytest.mark.parametrize(("groups_a_batch", "accumulation"), [(2, 2), (1, 4), (3, 1)])
def test_accumulation_on_two_ranks_is_one_large_batch(tmp_path, groups_a_batch, accumulation):
    distributed_run.train(tmp_path / "one", 2 * groups_a_batch * accumulation, 1, **ADAM)
    code, said = finish(launch(tmp_path / "two", "ddp", groups_a_batch, accumulation, **ADAM))
    assert code == 0, said
    assert_same(history(tmp_path / "two"), history(tmp_path / "one"))


@pytest.mark.parametrize(("groups_a_batch", "accumulation"), [(2, 4), (3, 3)])
def test_accumulation_is_one_large_batch(tmp_path, groups_a_batch, accumulation):
    """Of nine groups, the last micro-batch of an epoch has fewer: it counts for less."""
    distributed_run.train(tmp_path / "one", groups_a_batch * accumulation, 1, **ADAM)
    distributed_run.train(tmp_path / "parts", groups_a_batch, accumulation, **ADAM)
    assert_same(history(tmp_path / "parts"), history(tmp_path / "one"))


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_which_resumes(tmp_path):
    options = {**ADAM, "save_strategy": "steps", "save_steps": 2}
    code, said = finish(launch(tmp_path / "whole", "ddp", **options))
    assert code == 0, said
    started = time.monotonic()
    code, said = finish(launch(tmp_path / "killed", "ddp", **options, fault={"kill_rank": 1, "kill_step": 3}))
    assert code != 0
    assert "SIGKILL" in said
    assert time.monotonic() - started < 120
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    code, said = finish(launch(tmp_path / "killed", "ddp", **options, resume=True))
    assert code == 0, said
    assert_same(history(tmp_path / "killed"), history(tmp_path / "whole"), rel=0, abs=0)


@pytest.mark.slow
def test_nan_on_one_rank_ends_the_run_with_its_reason(tmp_path):
    code, said = finish(launch(tmp_path, "ddp", **ADAM, fault={"nan_rank": 1}))
    assert code != 0
    assert "hidden holds NaN in rows that count" in said
