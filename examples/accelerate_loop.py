"""MOPO in a plain loop: accelerate launch examples/accelerate_loop.py MODEL ROWS PRIMARY HELD THRESHOLD"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import mopo_loss, solve_dual
from mopo_trainer.data import labels, load_rows, to_groups, tokenize_group

model_name, path, primary, held, threshold = sys.argv[1:]
accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModelForCausalLM.from_pretrained(model_name)
groups, limits = to_groups(load_rows(path)), {"max_prompt_length": None, "max_length": 1024}
win_rate, group = labels(groups, [primary, held])  # [M, 2], [M]
dual = solve_dual(win_rate, group, torch.tensor([float(threshold)]), tau=0.08)
rows = [pair for g in groups for pair in tokenize_group(g["prompt"], g["responses"], tokenizer, **limits)]


def collate(chosen):  # right padding: later positions do not change earlier ones
    index = [i for i, of in enumerate(group.tolist()) if of in chosen]
    length = max(len(rows[i][0]) for i in index)
    ids = torch.tensor([rows[i][0] + [0] * (length - len(rows[i][0])) for i in index])
    kept = torch.tensor([[p <= n < len(t) for n in range(length)] for t, p in (rows[i] for i in index)])
    return ids, ids.masked_fill(~kept, -100)[:, 1:], win_rate[index].float(), group[index]


loader = DataLoader(range(len(groups)), batch_size=2, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loader)
for ids, target, labelled, of in loader:
    with accelerator.accumulate(model):
        hidden = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, :-1]
        head = accelerator.unwrap_model(model).get_output_embeddings().weight
        output = mopo_loss(hidden, head, target, labelled, of, dual.multipliers.to(hidden), tau=0.08)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {output.loss.item():.3f}  win rates {output.win_rates.tolist()}")
