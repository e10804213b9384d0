"""MOPO in transformers.Trainer: python examples/transformers_trainer.py MODEL ROWS PRIMARY HELD THRESHOLD"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from mopo_kernels import mopo_loss, solve_dual
from mopo_trainer.data import labels, load_rows, to_groups, tokenize_group

model_name, path, primary, held, threshold = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModelForCausalLM.from_pretrained(model_name)
groups = to_groups(load_rows(path))
win_rate, group = labels(groups, [primary, held])  # [M, 2], [M]
dual = solve_dual(win_rate, group, torch.tensor([float(threshold)]), tau=0.08)
limits = {"max_prompt_length": None, "max_length": 1024}
rows = [pair for g in groups for pair in tokenize_group(g["prompt"], g["responses"], tokenizer, **limits)]
examples = [[i for i, of in enumerate(group) if of == g] for g in range(len(groups))]  # a group's responses


def collate(chosen):
    index = [i for members in chosen for i in members]
    length = max(len(rows[i][0]) for i in index)
    ids = torch.tensor([rows[i][0] + [0] * (length - len(rows[i][0])) for i in index])
    kept = torch.tensor([[p <= n < len(t) for n in range(length)] for t, p in (rows[i] for i in index)])
    return {"ids": ids, "target": ids.masked_fill(~kept, -100)[:, 1:], "index": torch.tensor(index)}


class WithMOPO(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(inputs["ids"], output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, :-1]
        head, index = model.get_output_embeddings().weight, inputs["index"].cpu()
        labelled = win_rate[index].to(hidden), group[index].to(hidden.device), dual.multipliers.to(hidden)
        output = mopo_loss(hidden, head, inputs["target"], *labelled, tau=0.08)
        return (output.loss, output) if return_outputs else output.loss


args = TrainingArguments("runs/trainer", max_steps=4, logging_steps=1, remove_unused_columns=False, report_to="none")
WithMOPO(model, args, train_dataset=examples, data_collator=collate).train()
