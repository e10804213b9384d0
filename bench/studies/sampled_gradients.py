"""What sampling the LM head's gradient adds to the noise of a batch, on a real model's hidden states:

    python bench/studies/sampled_gradients.py bench/results/sampling

SmolLM2-135M reads the demo's prompts with a response each; the loss is the sum of −log p of all tokens. For each floor,
against the exact gradient: entries a row, the second moment that sampling adds to grad_hidden, and the relative error
of grad_weight, beside the sampling error that the batch itself has, by the scatter of its rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import linear_logprob
from mopo_kernels.head.call import HeadCall
from mopo_kernels.head.sampled import sampled_logprob
from mopo_trainer.commands.smollm import smollm2

DATA = Path(__file__).parents[2] / "python/mopo_trainer/commands/demo_data"
FLOORS = (2.0**-4, 2.0**-6, 2.0**-8)
ROWS, DRAWS = 300, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of results.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden, weight, target = rows()
    exact = gradients(hidden, weight, target)
    results = {
        "rows": len(target),
        "H": hidden.shape[1],
        "V": len(weight),
        "sampling_error_of_the_batch": batch_error(hidden, weight, target, exact[1]),
        "floors": [noise(floor, hidden, weight, target, exact) for floor in FLOORS],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head and the next tokens of the demo's texts."""
    source = smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    states, targets = [], []
    for text in texts():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states.append(model.model(ids).last_hidden_state[0, :-1])
        targets.append(ids[0, 1:])
        if sum(map(len, targets)) >= ROWS:
            break
    weight = model.get_output_embeddings().weight.detach()
    return torch.cat(states)[:ROWS], weight, torch.cat(targets)[:ROWS]


def texts() -> list[str]:
    with (DATA / "responses.jsonl").open() as lines:
        return [f"{row['prompt']}\n{row['responses'][0]}" for row in map(json.loads, lines)]


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, floor: float | None = None) -> tuple[Tensor, Tensor]:
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = -linear_logprob(*inputs, target, reduction="sum", grad_sampling=floor)
    grad_hidden, grad_weight = torch.autograd.grad(loss, inputs)
    return grad_hidden, grad_weight


def batch_error(hidden: Tensor, weight: Tensor, target: Tensor, exact: Tensor) -> float:
    """Relative standard error of grad_weight, a sum over rows of (onehot − p) ⊗ hidden, by the scatter of the rows."""
    p = torch.nn.functional.linear(hidden, weight).softmax(-1)
    squared = (p**2).sum(1) - 2 * p.gather(1, target[:, None])[:, 0] + 1
    total = (squared * (hidden**2).sum(1)).sum()
    count, mean = len(target), (exact**2).sum() / len(target)
    return float(((total - mean) * count / (count - 1)).sqrt() / exact.norm())


def noise(floor: float, hidden: Tensor, weight: Tensor, target: Tensor, exact: tuple[Tensor, Tensor]) -> dict:
    draws = [gradients(hidden, weight, target, floor) for _ in range(DRAWS)]
    added = [((x - exact[0]) ** 2).sum() / (exact[0] ** 2).sum() for x, _ in draws]
    errors = [(x - exact[1]).norm() / exact[1].norm() for _, x in draws]
    call = HeadCall.of(temperature=1.0, ignore_index=-100, grad_sampling=floor).on("cpu")
    uniform = torch.rand(len(target), dtype=torch.float64)
    counts = sampled_logprob(hidden, weight, None, target, uniform, call.flat())[6]
    return {
        "floor": floor,
        "entries_per_row": float(counts.float().mean()),
        "second_moment_added_to_grad_hidden": float(torch.stack(added).mean()),
        "relative_error_of_grad_weight": float(torch.stack(errors).mean()),
    }


if __name__ == "__main__":
    main()
