"""Three steps on each human-labelled set: its own labels and texts, a tiny random model in place of a real one.

summeval-op and qa-feedback are shipped under examples/data; hh-rlhf is not (offensive by design): its directory comes
from MOPO_HH_RLHF and the test says so where it is absent.
"""

import os
from pathlib import Path

import pytest
import torch

from mopo_trainer.data import load_rows, split_groups, to_groups
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "data"
HH_RLHF = Path(os.environ.get("MOPO_HH_RLHF", ROOT.parent / "shared" / "data" / "hh-rlhf"))


def train(tmp_path, model, tokenizer, file, scorers, *, primary, thresholds, groups=24, **options):
    """Three steps on the first groups of a file; returns the trainer and the logs."""
    data = to_groups(load_rows(file), scorers=load_scorers(scorers))
    train_groups, held_out = split_groups(data.select(range(min(groups, len(data)))), 0.25, seed=0)
    defaults = {
        "output_dir": str(tmp_path),
        "primary": primary,
        "thresholds": thresholds,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_prompt_length": 48,
        "max_length": 128,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer = MOPOTrainer(
        model,
        MOPOConfig(**{**defaults, **options}),
        train_dataset=train_groups,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in logs)
    assert before["eval_loss"] != after["eval_loss"]
    return trainer, logs, after


def test_summeval(tmp_path, tiny_model, tokenizer):
    trainer, logs, after = train(
        tmp_path,
        tiny_model,
        tokenizer,
        DATA / "summeval-op" / "summeval-op.jsonl",
        ["brevity"],
        primary="specificity",
        thresholds=["fluency=0.5", "brevity=0.5"],
        min_weight=1e-2,
    )
    assert trainer.dual.objectives[0] == "specificity"
    assert len(trainer.dual.objectives) == 8
    assert trainer.train_groups.group.bincount().tolist() == [13] * len(trainer.train_dataset)
    assert all(entry["multiplier/brevity"] > 0 for entry in logs)
    assert all(entry["skipped_tokens"] > 0 for entry in logs)
    assert {f"eval_win_rate/{name}" for name in trainer.dual.objectives} <= set(after)


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_qa_feedback(tmp_path, tiny_model, tokenizer, policy_step):
    trainer, logs, _ = train(
        tmp_path,
        tiny_model,
        tokenizer,
        DATA / "qa-feedback" / "qa-feedback.jsonl.gz",
        ["brevity"],
        primary="preferred",
        thresholds=["brevity=0.7"],
        policy_step=policy_step,
        share_prompt=True,
        as_chat=True,
    )
    assert trainer.dual.win_rates[1] > 0.3
    assert all(entry["multiplier/brevity"] > 0 for entry in logs)
    assert all(entry["skipped_tokens"] > 0 for entry in logs)  # shared prompts, and light responses under clone


def test_hh_rlhf(tmp_path, tiny_model, tokenizer):
    file = HH_RLHF / "harmless-base-test.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"hh-rlhf is not shipped; {file} is absent (set MOPO_HH_RLHF to its directory)")
    trainer, logs, _ = train(
        tmp_path,
        tiny_model,
        tokenizer,
        file,
        ["friendliness"],
        primary="preferred",
        thresholds=["friendliness=0.55"],
        groups=80,
    )
    assert trainer.train_groups.group.bincount().tolist() == [2] * len(trainer.train_dataset)
    assert all(entry["threshold/friendliness"] == 0.55 for entry in logs)
