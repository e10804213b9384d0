"""How far from the base model its own texts are, drawn as the demo draws them? At top-p the tail is cut off:

    python -m bench.studies.real_model.cut_tail bench/results/real_model

KL(base at top-p || base) of the next token is −log of the mass that is kept; summed over the tokens of a text, mean
over the base's texts to the held-out prompts. What clones such texts learns this cut, whatever their labels say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from bench.studies.real_model.data import DEMO, split
from bench.studies.real_model.measure import Texts, next_token_logits
from bench.studies.real_model.study import SEEDS, base_model
from mopo_trainer.files import atomic_path

FILE = "cut_tail.json"


@torch.no_grad()
def cut_tail(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Texts, top_p: float
) -> float:
    """Nats a text, of the first text to each prompt."""
    warp, total = TopPLogitsWarper(top_p), 0.0
    for prompt, samples in zip(prompts, texts, strict=True):
        logits = next_token_logits(tokenizer, prompt, samples[0], model)[0][0]  # [L, V]
        kept = warp(None, logits).isfinite()
        total -= float(logits.softmax(-1).where(kept, 0).sum(-1).log().sum())
    return total / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the directory of runs.jsonl")
    results = parser.parse_args().results
    found = {}
    for seed in SEEDS:
        held_out = split("demo", seed, "test")[1]
        found[seed] = round(cut_tail(*base_model(), held_out["prompt"], held_out["responses"], DEMO.top_p), 3)
    with atomic_path(results / FILE) as whole:
        whole.write_text(json.dumps({"top_p": DEMO.top_p, "nats a text, by seed": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
