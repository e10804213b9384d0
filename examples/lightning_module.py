"""MOPO in a LightningModule: python examples/lightning_module.py MODEL ROWS PRIMARY HELD THRESHOLD"""

import sys

import lightning
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from mopo_kernels import mopo_loss, solve_dual
from mopo_trainer.data import labels, load_rows, to_groups, tokenize_group

model_name, path, primary, held, threshold = sys.argv[1:]
tokenizer, limits = AutoTokenizer.from_pretrained(model_name), {"max_prompt_length": None, "max_length": 1024}
win_rate, group = labels(groups := to_groups(load_rows(path)), [primary, held])  # [M, 2], [M]
dual = solve_dual(win_rate, group, torch.tensor([float(threshold)]), tau=0.08)
rows = [pair for g in groups for pair in tokenize_group(g["prompt"], g["responses"], tokenizer, **limits)]


def collate(chosen):  # right padding: later positions do not change earlier ones
    index = [i for i, of in enumerate(group.tolist()) if of in chosen]
    ids = pad_sequence([torch.tensor(rows[i][0]) for i in index], True)
    replies = [torch.tensor([-100] * prompt + tokens[prompt:]) for tokens, prompt in (rows[i] for i in index)]
    return ids, pad_sequence(replies, True, -100)[:, 1:], win_rate[index].float(), group[index]


class WithMOPO(lightning.LightningModule):
    def training_step(self, batch, _):
        hidden = self.model(batch[0], output_hidden_states=True, logits_to_keep=1).hidden_states[-1][:, :-1]
        return mopo_loss(hidden, self.model.lm_head.weight, *batch[1:], dual.multipliers.to(hidden), tau=0.08).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


module, trainer = WithMOPO(), lightning.Trainer(max_epochs=1)
module.model = AutoModelForCausalLM.from_pretrained(model_name).train()
trainer.fit(module, torch.utils.data.DataLoader(range(len(groups)), 2, True, collate_fn=collate))
