"""What is measured of a model: sampled texts against the base model's, KL to it, its loss on ordinary text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench.studies.real_model.data import DEMO, EXAMPLES, SCORERS, Data
from mopo_trainer.commands.sampling import Sampling, sample_responses
from mopo_trainer.report.evaluate import sampled_win_rates

SAMPLES = 3
KL_TEXTS = 16
TEMPLATE_TOKENS = 32
ORDINARY_TEXTS, ORDINARY_TOKENS = 8, 256

Texts = list[list[str]]  # [prompt][sample]


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    seed: int,
    max_new_tokens: int = DEMO.max_new_tokens,
) -> Texts:
    """Texts of a model as the demo draws them."""
    how = Sampling(
        num_samples=SAMPLES,
        max_new_tokens=max_new_tokens,
        temperature=DEMO.temperature,
        top_p=DEMO.top_p,
        seed=1000 + seed,
        batch_size=192,
    )
    return sample_responses(model, tokenizer, prompts, how)


def win_rates(prompts: Sequence[str], ours: Texts, base: Texts, data: Data) -> dict[str, list[float]]:
    """Win rate of every prompt, by objective that is a scorer."""
    scorers = {name: SCORERS[name] for name in data.scorers}
    found = sampled_win_rates(prompts, ours, base, scorers)
    return {name: [round(x, 4) for x in values.tolist()] for name, values in found.items()}


def shorten(prompt: str, tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    """The end of a prompt, with as many tokens as training leaves it beside the template's."""
    ids, most = tokenizer(prompt)["input_ids"], data.max_prompt_length - TEMPLATE_TOKENS
    return prompt if len(ids) <= most else tokenizer.decode(ids[-most:])


def words(texts: Texts) -> float:
    lengths = [len(text.split()) for samples in texts for text in samples]
    return round(sum(lengths) / len(lengths), 2)


@torch.no_grad()
def kl(
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    texts: Texts,
) -> float:
    """Nats a text: KL(π || base) of the next token, summed over the tokens of a text of π, mean over texts."""
    total = 0.0
    chosen = list(zip(prompts, texts, strict=True))[:KL_TEXTS]
    for prompt, samples in chosen:
        ours, theirs = (x.log_softmax(-1) for x in next_token_logits(tokenizer, prompt, samples[0], model, base))
        total += float((ours.exp() * (ours - theirs)).sum())
    return round(total / len(chosen), 3)


def next_token_logits(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, *models: PreTrainedModel
) -> list[Tensor]:  # of every model [1, L, V]
    """What models say of each next token of a text that answers a prompt."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    start = len(tokenizer(chat, add_special_tokens=False)["input_ids"])
    ids = tokenizer(chat + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    keep = ids.shape[1] - start + 1  # the last prompt token predicts the first of the text
    return [model(input_ids=ids, logits_to_keep=keep).logits for model in models]


@torch.no_grad()
def ordinary_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Nats a token on passages of Wikipedia: those of the questions at the end of qa-feedback."""
    with gzip.open(EXAMPLES / "qa-feedback" / "qa-feedback.jsonl.gz", "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    losses: list[Tensor] = []
    for row in rows[-ORDINARY_TEXTS:]:
        text = row["prompt"].split("\n\n", 1)[1]
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : ORDINARY_TOKENS + 1]
        losses.append(cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())
