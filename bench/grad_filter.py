"""What does grad_filter leave, and what does it cost, on a real model? SmolLM2-135M's hidden states on HH-RLHF text:

    python bench/grad_filter.py shared/data/hh-rlhf/harmless-base-test.jsonl.gz bench/results/grad-filter

Per threshold: the share of elements and of 128 × 128 blocks with a probability above it, the relative error of the
gradients of hidden and weight, and forward plus backward against no filter. Columns are taken as they stand and ordered
by mean logit, which gathers likely tokens in common blocks.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import linear_logprob
from mopo_trainer.data import load_rows
from mopo_trainer.files import write_json
from mopo_trainer.commands.smollm import smollm2

BLOCK = 128
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="HH-RLHF rows")
    parser.add_argument("output", type=Path, help="directory for grad_filter.json")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    hidden, weight, target = real_hidden_states(options.data, options.tokens)
    order = (hidden @ weight.t()).mean(0).argsort(descending=True)
    found = []
    for name, permutation in (("as they stand", torch.arange(len(weight))), ("by mean logit", order)):
        head = weight[permutation]
        moved = torch.empty_like(permutation).scatter_(0, permutation, torch.arange(len(permutation)))[target]
        found += [{"columns": name} | one for one in filtered(hidden, head, moved)]
    write_json(options.output / "grad_filter.json", found)
    print(json.dumps(found, indent=1))


def real_hidden_states(data: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states [N, H], the LM head [V, H] and the next tokens [N] of the first texts."""
    directory = smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    hidden, target = [], []
    for row in load_rows(data):
        ids = tokenizer(row["chosen"], return_tensors="pt", truncation=True, max_length=256)["input_ids"]
        with torch.no_grad():
            hidden.append(model.model(ids).last_hidden_state[0, :-1])
        target.append(ids[0, 1:])
        if sum(map(len, target)) >= tokens:
            break
    return torch.cat(hidden)[:tokens], model.get_output_embeddings().weight.detach(), torch.cat(target)[:tokens]


def filtered(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> list[dict]:
    hidden.requires_grad_()
    weight = weight.clone().requires_grad_()
    p = (hidden.detach() @ weight.detach().t()).softmax(-1)
    blocks = torch.stack([torch.stack([b.amax() for b in rows.split(BLOCK, 1)]) for rows in p.split(BLOCK)])
    exact = gradients(hidden, weight, target, None)
    found = []
    for exponent in (-16, -14, -12, -10, -8):
        threshold = 2.0**exponent
        errors = [
            ((a - b).norm() / b.norm()).item()
            for a, b in zip(gradients(hidden, weight, target, threshold), exact, strict=True)
        ]
        ratios = []
        for _ in range(ROUNDS):  # interleaved, so that other work on the machine falls on both alike
            alone, with_filter = (seconds(hidden, weight, target, f) for f in (None, threshold))
            ratios.append(with_filter / alone)
        found.append(
            {
                "grad_filter": f"2^{exponent}",
                "elements above": (p >= threshold).double().mean().item(),
                "blocks kept": (blocks >= threshold).double().mean().item(),
                "probability dropped": torch.where(p < threshold, p, 0).sum(-1).mean().item(),
                "error of grad_hidden": errors[0],
                "error of grad_weight": errors[1],
                "time against no filter": statistics.median(ratios),
            }
        )
    return found


def gradients(hidden, weight, target, grad_filter):
    logp = linear_logprob(hidden, weight, target, grad_filter=grad_filter)
    return torch.autograd.grad(-logp.mean(), (hidden, weight))


def seconds(*arguments) -> float:
    start = time.perf_counter()
    gradients(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
