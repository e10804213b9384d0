"""The labelled groups of a study, and which of them a seed trains on and is measured on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset

from mopo_trainer.commands.demo import PRIMARY, THRESHOLDS, Settings
from mopo_trainer.commands.sampling import DEMO_DATA
from mopo_trainer.data import load_rows, plain_text, to_groups
from mopo_trainer.data.scorers import BUILT_IN, Scorer

FOLDS = 3
EXAMPLES = Path("examples/data")
DEMO = Settings()


def on_topic(prompt: str, response: str) -> float:
    """Share of the prompt's words of four letters and more that the response takes up."""
    asked, given = (set(re.findall(r"\w{4,}", text.lower())) for text in (prompt, response))
    return len(asked & given) / max(1, len(asked))


SCORERS: dict[str, Scorer] = {**BUILT_IN, "on_topic": on_topic}


@dataclass(frozen=True)
class Data:
    """Labelled responses, what is asked of them, and what a run on them may cost."""

    source: Path
    primary: str
    thresholds: Mapping[str, float]
    scorers: tuple[str, ...]  # objectives computed from the text: those that sampled texts can be measured by
    budget: int = 14_000  # tokens forward and backward through the policy
    held_out: int = 49  # prompts of a seed
    eps: float = DEMO.eps
    groups_per_step: Mapping[str, int] = field(default_factory=lambda: {"clone": 4, "contrast": 2, "dpo": 2})
    preferred: str = "preferred"  # what chosen and rejected mean
    max_prompt_length: int = 160  # cut from the left
    max_length: int = 288
    max_new_tokens: int = DEMO.max_new_tokens
    tuning_prompts: int = 0  # of all groups, kept for the choice of learning rates
    own: bool = False  # the model itself wrote the responses
    shipped: bool = True  # texts may be kept beside the results

    @property
    def human(self) -> tuple[str, ...]:
        """Objectives that only people can judge: of them the log-probs of labelled responses must tell."""
        return tuple(name for name in self.objectives if name not in self.scorers)

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.primary, *self.thresholds)


PAIRS = {"clone": 8, "contrast": 4, "dpo": 4}  # groups of a step, as many responses as of groups of four
DATA = {
    "demo": Data(
        DEMO_DATA / "responses.jsonl", PRIMARY, THRESHOLDS, (PRIMARY, *THRESHOLDS), tuning_prompts=20, own=True
    ),
    "qa-feedback": Data(
        EXAMPLES / "qa-feedback/qa-feedback.jsonl.gz",
        "preferred",
        {"brevity": 0.7},
        ("brevity",),
        budget=21_000,
        held_out=24,
        eps=0.0,
    ),
    "hh-harmless": Data(
        Path("../shared/data/hh-rlhf/harmless-base-test.jsonl.gz"),
        "harmless",
        {"on_topic": 0.6},
        ("on_topic",),
        held_out=48,
        eps=0.0,
        groups_per_step=PAIRS,
        preferred="harmless",
        shipped=False,
    ),
    "summeval-op": Data(
        EXAMPLES / "summeval-op/summeval-op.jsonl",
        "specificity",
        {"brevity": 0.5},
        ("brevity",),
        budget=24_000,
        held_out=11,
        eps=0.0,
        groups_per_step={"clone": 2, "contrast": 1, "dpo": 1},  # of 13 responses
        max_prompt_length=640,
        max_length=832,
        max_new_tokens=160,
    ),
}


@cache
def groups_of(name: str) -> Dataset:
    """All groups of one turn, labelled, in an order that their file does not know; prompts and responses as text."""
    data = DATA[name]
    rows = load_rows(str(data.source), on_bad_row="skip")
    scorers = {scorer: SCORERS[scorer] for scorer in data.scorers}
    groups = to_groups(rows, scorers=scorers, preferred=data.preferred, on_bad_row="skip")
    if not isinstance(groups[0]["prompt"], str):
        turns = [len(prompt) for prompt in groups["prompt"]]
        groups = groups.select([i for i, count in enumerate(turns) if count == 1]).map(_as_text)
    return groups.select(torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist())


def _as_text(row: dict) -> dict:
    return {"prompt": row["prompt"][0]["content"], "responses": [plain_text(x) for x in row["responses"]]}


def split(name: str, seed: int, part: str) -> tuple[Dataset, Dataset]:
    """(train, held-out) groups: three seeds in turn hold out different thirds of all but the tuning prompts."""
    groups, data = groups_of(name), DATA[name]
    random = torch.Generator().manual_seed(seed // FOLDS)
    rest = data.tuning_prompts + torch.randperm(len(groups) - data.tuning_prompts, generator=random)
    thirds = list(rest.tensor_split(FOLDS))
    held_out = thirds.pop(seed % FOLDS)[: data.held_out].tolist()
    measured = groups.select(held_out if part == "test" else range(data.tuning_prompts))
    kept_out = set(measured["prompt"])  # a few prompts have two groups
    train = groups.select([i for i in torch.cat(thirds).tolist() if groups[i]["prompt"] not in kept_out])
    return train, measured
