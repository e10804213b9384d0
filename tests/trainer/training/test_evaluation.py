"""Held-out sets by name: metrics, references, the best checkpoint, resuming."""

import copy
import logging
import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import plain_logps

from mopo_trainer.data.sources import DataError
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.resume import STATE_FILE
from mopo_trainer.training.trainer import MOPOTrainer


def make(tmp_path, model, tokenizer, rows, eval_dataset, **options):
    peft_config = options.pop("peft_config", None)
    defaults = {
        "output_dir": str(tmp_path),
        "primary": "friendly",
        "thresholds": ["brief=0.4"],
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = MOPOConfig(**{**defaults, **options})
    return MOPOTrainer(model, args, rows, eval_dataset, processing_class=tokenizer, peft_config=peft_config)


def logged(trainer, name):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def test_every_set_is_evaluated_as_if_it_were_the_only_one(tmp_path, tiny_model, tokenizer, pairs):
    sets = {"first": pairs[:3], "rest": Dataset.from_list(pairs[3:])}
    trainer = make(
        tmp_path / "both",
        copy.deepcopy(tiny_model),
        tokenizer,
        pairs,
        DatasetDict({name: Dataset.from_list(list(rows)) for name, rows in sets.items()}),
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    for name, rows in sets.items():
        alone = make(
            tmp_path / name, copy.deepcopy(tiny_model), tokenizer, pairs, rows, eval_strategy="steps", eval_steps=2
        )
        alone.train()
        for metric in ("loss", "win_rate/friendly", "win_rate/brief", "agreement/friendly"):
            assert logged(trainer, f"eval_{name}_{metric}") == logged(alone, f"eval_{metric}")
            assert set(logged(alone, f"eval_{metric}")) == {2, 4}
    assert logged(trainer, "eval_first_loss") != logged(trainer, "eval_rest_loss")
    assert not logged(trainer, "eval_loss")


def test_evaluate_takes_sets_and_names(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, {"a": pairs[:2], "b": (row for row in pairs[2:])})
    everything = trainer.evaluate()
    direct = trainer.evaluate({"a": pairs[:2], "b": pairs[2:]}, metric_key_prefix="test")
    assert {name.replace("test_", "eval_"): value for name, value in direct.items()} == everything
    assert trainer.evaluate("b", metric_key_prefix="b")["b_loss"] == everything["eval_b_loss"]
    assert trainer.evaluate(trainer.eval_dataset) == everything
    with pytest.raises(DataError, match="eval_dataset is an empty dict"):
        trainer.evaluate({})


def test_each_set_has_its_own_reference(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, {"a": pairs[:3], "b": pairs[3:6]}, policy_step="contrast")
    expected = {name: plain_logps(tiny_model, groups.sequences()) for name, groups in trainer.eval_groups.items()}
    trainer.start_dual()
    for name, groups in trainer.eval_groups.items():
        torch.testing.assert_close(trainer._eval_reference(groups, name), expected[name], rtol=1e-5, atol=1e-5)


def test_a_set_that_lacks_an_objective_is_measured_on_the_others(tmp_path, tiny_model, tokenizer, pairs, caplog):
    friendly = [{**row, "preference": {"friendly": 1.0}} for row in pairs[:3]]
    brief = [{**row, "preference": {"friendly": None, "brief": 0.0}} for row in pairs[3:]]
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, tiny_model, tokenizer, pairs, {"one": friendly, "two": brief})
    assert "eval_dataset['one'] has no labels for brief: not measured there" in caplog.messages
    assert "eval_dataset['two'] has no labels for friendly: not measured there" in caplog.messages
    metrics = trainer.evaluate()
    measured = {name for name in metrics if "win_rate" in name}
    assert measured == {"eval_one_win_rate/friendly", "eval_two_win_rate/brief"}
    assert all(math.isfinite(value) for value in metrics.values())
    other = [{**row, "preference": {"funny": 1.0}} for row in pairs]
    with pytest.raises(DataError, match=r"eval_dataset\['c'\] has labels for none of the objectives friendly, brief"):
        make(tmp_path, tiny_model, tokenizer, pairs, {"c": other})


def test_the_best_checkpoint_is_that_of_the_named_set(tmp_path, tiny_model, tokenizer, pairs):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6}
    options = {**steps, "load_best_model_at_end": True, "metric_for_best_model": "same_win_rate/friendly"}
    other = [
        {**row, "preference": {"friendly": 0.0, "brief": 1.0}} for row in pairs
    ]  # gets worse as `same` gets better
    best = {}
    for metric in ("same_win_rate/friendly", "eval_other_loss", "eval_other_win_rate/friendly"):
        options["metric_for_best_model"] = metric
        trainer = make(
            tmp_path / metric.replace("/", "_"),
            copy.deepcopy(tiny_model),
            tokenizer,
            pairs,
            {"same": pairs, "other": other},
            **options,
        )
        trainer.train()
        values = logged(trainer, f"eval_{metric.removeprefix('eval_')}")
        wanted = (min if metric.endswith("loss") else max)(values, key=values.get)
        best[metric] = trainer.state.best_model_checkpoint
        assert best[metric].endswith(f"checkpoint-{wanted}")
        saved = load_file(f"{best[metric]}/model.safetensors")
        torch.testing.assert_close(trainer.model.model.norm.weight, saved["model.norm.weight"])
    assert best["same_win_rate/friendly"][-1] != best["eval_other_win_rate/friendly"][-1]


@pytest.mark.parametrize("metric", [None, "loss", "a_win_rate/funny", "b_loss"])
def test_a_best_metric_that_does_not_exist_is_refused_at_once(tmp_path, tiny_model, tokenizer, pairs, metric):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": metric}
    with pytest.raises(ValueError, match=r"is no metric of this run; it has: eval_a_loss, eval_a_win_rate/friendly"):
        make(tmp_path, tiny_model, tokenizer, pairs, {"a": pairs}, **options)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_evaluates_against_the_policy_of_its_start(tmp_path, tiny_model, tokenizer, pairs, adapter):
    sets = {"a": pairs[:3], "b": pairs[3:]}
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}

    def run(name, eval_dataset, resume=None):
        torch.manual_seed(0)
        lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if adapter else {}
        made = make(tmp_path / name, copy.deepcopy(tiny_model), tokenizer, pairs, eval_dataset, **lora, **options)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("whole", sets)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = run("resumed", sets, str(checkpoint))
    for name in sets:
        for metric in ("loss", "win_rate/friendly", "win_rate/brief"):
            assert logged(resumed, f"eval_{name}_{metric}") == logged(whole, f"eval_{name}_{metric}")
    assert sum(name.startswith("reference.eval.") for name in load_file(checkpoint / STATE_FILE)) == 2
    if adapter:  # the reference of other rows is still there
        assert logged(run("other", pairs[2:4], str(checkpoint)), "eval_loss")
    else:
        with pytest.raises(ValueError, match="need the log-probs of the policy before training"):
            run("other", {"a": pairs[:3], "b": pairs[2:4]}, str(checkpoint))
