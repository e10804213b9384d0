"""MOPO inside TRL's GRPO and RLOO trainers: real runs of a tiny model that samples a few tokens."""

import pytest
import torch
from datasets import Dataset
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mopo_trainer.data.errors import DataError

pytest.importorskip("trl")

from trl import GRPOConfig, RLOOConfig

from mopo_trainer.integrations.trl import MOPOGRPOTrainer, MOPORLOOTrainer

KINDS = {"grpo": (MOPOGRPOTrainer, GRPOConfig), "rloo": (MOPORLOOTrainer, RLOOConfig)}


def letters(completions, **_):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def digits(completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


ROWS = [{"prompt": f"Question {i}?", "opponents": ["abc", "1 2", "x7y"][: 2 + i % 2]} for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(tokenizer).save_pretrained(path)
    return path


def make(kind, folder, tmp_path, tokenizer, *, rows=ROWS, funcs=(letters, digits), trainer=None, **options):
    trainer_type, config_type = KINDS[kind]
    defaults = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6}
    defaults |= {"learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True}
    defaults |= {"save_strategy": "no", "report_to": "none"}
    return trainer_type(
        AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=list(funcs),
        args=config_type(output_dir=str(tmp_path), **{**defaults, **options}),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        **{"primary": "letters", "thresholds": {"digits": 0.6}, **(trainer or {})},
    )


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_grpos_advantages_are_those_of_win_rates_and_multipliers(folder, tmp_path, tokenizer):
    trainer = make("grpo", folder, tmp_path, tokenizer, scale_rewards="none")
    trainer.model.train()
    trainer.dual.multipliers[1] = 0.7
    batch = trainer._prepare_inputs([{**row} for row in ROWS[:2] for _ in range(4)])
    texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    advantages = dict(zip(texts, batch["advantages"].tolist(), strict=True))
    opponents = [ROWS[0]["opponents"] * 2, [*ROWS[1]["opponents"], ROWS[1]["opponents"][0]]]
    completions = list(trainer._logs["completion"])
    for g in range(2):
        scores = []
        for text in completions[4 * g : 4 * g + 4]:
            wins = [
                sum((ours > theirs) + 0.5 * (ours == theirs) for theirs in score(opponents[g])) / 4
                for score in (letters, digits)
                for ours in score([text])
            ]
            scores.append(wins[0] + 0.7 * wins[1])
        for text, score in zip(completions[4 * g : 4 * g + 4], scores, strict=True):
            assert advantages[text] == pytest.approx(score - sum(scores) / 4, abs=1e-6)
    table = trainer._logs["rewards"]  # as the reward functions gave them, not as win rates
    assert list(table["letters"]) == letters(completions)
    assert trainer._metrics["train"]["rewards/digits/mean"] == [pytest.approx(sum(digits(completions)) / 8)]


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_move_by_what_is_measured(kind, folder, tmp_path, tokenizer):
    trainer = make(kind, folder, tmp_path, tokenizer, trainer={"multiplier_lr": 0.5}, beta=0.1)
    trainer.train()
    first, second = logged(trainer)
    assert first["multiplier/digits"] == 0
    assert first["slack/digits"] == pytest.approx(first["win_rate/digits"] - 0.6)
    assert first["threshold/digits"] == 0.6
    assert second["multiplier/digits"] == pytest.approx(max(0, -0.5 * first["slack/digits"]))
    assert second["multiplier/letters"] == 1
    assert second["reward"] == pytest.approx(
        second["win_rate/letters"] + second["multiplier/digits"] * second["win_rate/digits"], abs=1e-5
    )
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(trainer.model.lm_head.weight, start.lm_head.weight)


@pytest.mark.slow
def test_training_raises_what_is_maximised_and_what_is_held(folder, tmp_path, tokenizer):
    """A model of random bytes learns letters, and digits as far as the threshold asks."""
    runs = {}
    for threshold in (None, 0.6):
        held = {} if threshold is None else {"digits": threshold}
        trainer = make(
            "rloo", folder, tmp_path, tokenizer, max_steps=40, per_device_train_batch_size=32, num_generations=8,
            trainer={"thresholds": held, "multiplier_lr": 0.5}, beta=0.0,
        )  # fmt: skip
        trainer.train()
        last = logged(trainer)[-10:]
        runs[threshold] = {key: sum(x[f"win_rate/{key}"] for x in last) / 10 for key in ("letters", "digits")}
    assert runs[None]["letters"] > logged(trainer)[0]["win_rate/letters"] + 0.1
    assert runs[0.6]["digits"] > runs[None]["digits"] + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, folder, tmp_path, tokenizer):
    whole = make(kind, folder, tmp_path, tokenizer, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(kind, folder, tmp_path / "again", tokenizer, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [x["loss"] for x in logged(resumed)] == [x["loss"] for x in logged(whole)]
    assert torch.equal(resumed.dual.multipliers, whole.dual.multipliers)
    assert whole.dual.multipliers[1] > 0
    other = make(kind, folder, tmp_path / "other", tokenizer, funcs=(digits, letters))
    with pytest.raises(ValueError, match="its run had other objectives; resume with the same"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = make(kind, folder, tmp_path / "other", tokenizer, trainer={"thresholds": {"digits": 0.5}})
    with pytest.raises(ValueError, match="other thresholds"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    file = tmp_path / "checkpoint-2" / "mopo_state.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"its mopo_state\.safetensors is damaged"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_measures_and_moves_nothing(folder, tmp_path, tokenizer):
    trainer = make("grpo", folder, tmp_path, tokenizer, per_device_eval_batch_size=8)
    before = trainer.dual.multipliers.clone()
    found = trainer.evaluate(Dataset.from_list(ROWS))
    assert 0 <= found["eval_win_rate/digits"] <= 1
    assert torch.equal(trainer.dual.multipliers, before)


def test_a_reward_that_is_missing(folder, tmp_path, tokenizer):
    def sometimes(completions, **_):
        return [None if i % 4 < 2 else float(i) for i in range(len(completions))]

    def never(completions, **_):
        return [None] * len(completions)

    trainer = make(
        "grpo", folder, tmp_path, tokenizer, funcs=(letters, sometimes, never), trainer={"thresholds": {"never": 0.9}}
    )
    trainer.train()
    assert trainer.dual.multipliers.tolist() == [1, 0, 0]
    assert "win_rate/never" not in logged(trainer)[0]
    assert 0 <= logged(trainer)[0]["win_rate/sometimes"] <= 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_what_is_refused(folder, tmp_path, tokenizer):
    def infinite(completions, **_):
        return [float("inf")] * len(completions)

    def refused(error, match, kind="grpo", **options):
        with pytest.raises(error, match=match):
            make(kind, folder, tmp_path, tokenizer, **options).train()

    refused(ValueError, "primary must be one of the objectives letters, digits", trainer={"primary": "words"})
    refused(ValueError, "'words' is not one of the objectives", trainer={"thresholds": {"words": 0.5}})
    refused(ValueError, "reward_weights=.* has no meaning beside thresholds", reward_weights=[1.0, 2.0])
    refused(ValueError, "multi_objective_aggregation=", multi_objective_aggregation="normalize_then_sum")
    refused(ValueError, "reward_clip_range=", kind="rloo", reward_clip_range=(-1.0, 1.0))
    refused(ValueError, "different names", funcs=(letters, letters))
    refused(ValueError, "'infinite' returned an infinite reward", funcs=(letters, digits, infinite))
    refused(DataError, "a row has no `opponents`", rows=[{"prompt": "Hi?"}] * 4)
    refused(DataError, "`opponents` holds", rows=[{"prompt": "Hi?", "opponents": [3, 4]}] * 4)


def test_chats_have_opponents_as_texts_or_messages(folder, tmp_path, tokenizer):
    seen = []

    def spoken(completions, **_):
        seen.extend(completions)
        return [float(len(completion[-1]["content"])) for completion in completions]

    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "opponents": opponents}
        for i, opponents in enumerate([["yes", "no"], ["never", "always"]])
    ]
    make("grpo", folder, tmp_path, tokenizer, rows=rows, funcs=(spoken,), max_steps=1,
         trainer={"primary": "spoken", "thresholds": None}).train()  # fmt: skip
    assert [{"role": "assistant", "content": "always"}] in seen
    messages = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "never"}]]
    rows = [{**row, "opponents": [message]} for row, message in zip(rows, messages, strict=True)]
    seen.clear()
    make("rloo", folder, tmp_path, tokenizer, rows=rows, funcs=(spoken,), max_steps=1,
         trainer={"primary": "spoken", "thresholds": None}).train()  # fmt: skip
    assert messages[1] in seen


def test_what_opponents_log_is_not_logged(folder, tmp_path, tokenizer):
    """Extra columns of the table of completions and metrics of reward functions are the samples' own."""

    def watched(completions, log_extra, log_metric, **_):
        log_extra("length", [len(text) for text in completions])
        log_metric("longest", max(len(text) for text in completions))
        return [float(len(text)) for text in completions]

    rows = [{**row, "opponents": ["a" * 100]} for row in ROWS]
    options = {"trainer": {"primary": "watched", "thresholds": None}, "log_completions": True, "max_steps": 1}
    trainer = make("grpo", folder, tmp_path, tokenizer, rows=rows, funcs=(watched,), **options)
    trainer.train()
    assert logged(trainer)[0]["longest"] < 100
    assert len(trainer._logs["extra"]["length"]) == 8
    assert logged(trainer)[0]["win_rate/watched"] == 0
