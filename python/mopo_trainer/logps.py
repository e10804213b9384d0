"""Log-probabilities of whole responses under a model: reference passes, lag refreshes, evaluation.

Responses are flattened over groups; `first_response` says where a group's responses start.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mopo_kernels import sequence_logprob
from mopo_trainer.data import labels, tokenize_group

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenizedGroups:
    """Groups as the trainer reads them; row i of `win_rate` and `group` belongs to response i of all."""

    dataset: Dataset  # input_ids [n][*], prompt_tokens [n], first_response
    win_rate: Tensor  # [M, K] float64, NaN = unlabelled
    group: Tensor  # [M]

    def fingerprint(self) -> str:
        """Hash of every token: equal exactly when the model would see the same responses in the same order."""
        digest = hashlib.sha256()
        for row in self.dataset:
            for ids, prompt_tokens in zip(row["input_ids"], row["prompt_tokens"], strict=True):
                digest.update(np.asarray([len(ids), prompt_tokens, *ids], dtype=np.int64).tobytes())
        return digest.hexdigest()

    def sequences(self) -> list[tuple[list[int], int]]:
        """(input_ids, prompt_tokens) of every response."""
        return [pair for row in self.dataset for pair in zip(row["input_ids"], row["prompt_tokens"], strict=True)]


def tokenize_groups(groups: Dataset, objectives: Sequence[str], tokenizer: Any, **lengths: Any) -> TokenizedGroups:
    """Tokenise groups (see `mopo_trainer.data`) once; `lengths` are the options of `tokenize_group`."""
    win_rate, group = labels(groups, objectives)

    def tokenize(row: Mapping[str, Any]) -> dict[str, list]:
        sequences = tokenize_group(row["prompt"], row["responses"], tokenizer, **lengths)
        return {"input_ids": [ids for ids, _ in sequences], "prompt_tokens": [prompt for _, prompt in sequences]}

    dataset = groups.map(tokenize, remove_columns=groups.column_names, desc="Tokenising", keep_in_memory=True)
    sizes = torch.bincount(group, minlength=len(groups))
    first = (sizes.cumsum(0) - sizes).tolist()
    return TokenizedGroups(dataset.add_column("first_response", first), win_rate, group)


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of groups as flat sequences: input_ids and attention_mask [B, L], right-padded; prompt_tokens, response
    (index among all responses) and group (index of the row in the batch), each [B]."""
    sequences = [(ids, prompt) for row in rows for ids, prompt in zip(row["input_ids"], row["prompt_tokens"])]
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    first = torch.tensor([row["first_response"] for row in rows])
    group = torch.arange(len(rows)).repeat_interleave(sizes)
    offset = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes)[group]
    return {**pad(sequences, pad_token_id), "response": first[group] + offset, "group": group}


def pad(sequences: Sequence[tuple[Sequence[int], int]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-pad (input_ids, prompt_tokens) pairs to input_ids and attention_mask [B, L] and prompt_tokens [B]."""
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    input_ids = torch.full((len(sequences), int(lengths.max())), pad_token_id)
    for row, (ids, _) in zip(input_ids, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "prompt_tokens": torch.tensor([prompt for _, prompt in sequences]),
    }


def select_sequences(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The sequences at `index`, cut to the longest of them."""
    length = int(batch["attention_mask"][index].sum(-1).max())
    return {
        "input_ids": batch["input_ids"][index, :length],
        "attention_mask": batch["attention_mask"][index, :length],
        "prompt_tokens": batch["prompt_tokens"][index],
    }


def next_token_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """target[b, l] = the token after position l where that token belongs to the response, else IGNORE_INDEX; [B, L]."""
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    position = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    counts = (position >= batch["prompt_tokens"][:, None]) & attention_mask[:, 1:].bool()
    target = torch.full_like(input_ids, IGNORE_INDEX)
    target[:, :-1] = input_ids[:, 1:].where(counts, IGNORE_INDEX)
    return target


def last_hidden_states(model: nn.Module, decoder: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Hidden states [B, L, H] in front of the LM head.

    The whole model is called, so that wrappers (DDP) see their forward pass; its head runs on one position only.
    """
    captured: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda module, args, output: captured.append(output[0]))
    keep_one = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}
    try:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **keep_one)
    finally:
        handle.remove()
    return captured[0]


def _takes_logits_to_keep(model: Any) -> bool:
    model = getattr(model, "module", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@dataclass(frozen=True)
class LMHead:
    """The LM head of a Hugging Face model as arguments of `linear_logprob`."""

    weight: Tensor  # [V, H]
    options: dict[str, Any]  # bias, softcap, logit_scale

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        """Raises ValueError where the head is no plain linear layer (an adapter on it, a quantised head)."""
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"the LM head is a {type(head).__name__}; the fused loss needs a plain linear layer "
                "(leave lm_head out of the adapter's target_modules and modules_to_save)"
            )
        config = model.config.get_text_config()
        logit_scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, {"bias": head.bias, "softcap": softcap, "logit_scale": logit_scale})


@torch.no_grad()
def response_logps(
    model: nn.Module,
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    accelerator: Accelerator,
    batch_size: int,
    pad_token_id: int,
    backend: str | None = None,
    adapter_off: bool = False,
    description: str = "Log-probs",
) -> Tensor:  # [M]
    """log π(y|x), the sum over the response's tokens, of every response; float64 on the CPU, the same on every rank.

    `sequences` are (input_ids, prompt_tokens) pairs; `adapter_off` scores a peft model's base. They are taken longest first, `batch_size` at a time, shared among the ranks.
    """
    plain = accelerator.unwrap_model(model)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]), reverse=True)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rank, world = accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, len(sequences), dtype=torch.float64)
    was_training = plain.training
    plain.eval()
    with plain.disable_adapter() if adapter_off else nullcontext():
        for i in tqdm(range(0, len(batches), world), desc=description, disable=not accelerator.is_local_main_process):
            indices = batches[(i + rank) % len(batches)]  # every rank runs as many forward passes as the others
            batch = {
                name: tensor.to(accelerator.device)
                for name, tensor in pad([sequences[j] for j in indices], pad_token_id).items()
            }
            logp = sequence_logps(model, plain, batch, accelerator=accelerator, backend=backend)
            total[0, indices] += logp.double().cpu()
            total[1, indices] += 1
    plain.train(was_training)
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum").cpu()
    return total[0] / total[1]


def sequence_logps(
    model: nn.Module, plain: PreTrainedModel, batch: Mapping[str, Tensor], *, accelerator: Accelerator, backend: str | None
) -> Tensor:  # [B]
    """log π(y|x) of a padded batch; `plain` is `model` without wrappers."""
    hidden = last_hidden_states(model, plain.get_decoder(), batch)
    head = LMHead.of(plain)
    with accelerator.autocast():
        return sequence_logprob(
            hidden.to(head.weight.dtype), head.weight, next_token_targets(batch), backend=backend, **head.options
        )


def parameters_fingerprint(model: nn.Module, is_reference: Callable[[nn.Parameter], bool]) -> str:
    """Hash of the reference weights: names, shapes and, per parameter, its sum and absolute sum in float64."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_reference(parameter):
            values = parameter.detach()
            sums = (values.sum(dtype=torch.float64).item(), values.abs().sum(dtype=torch.float64).item())
            digest.update(repr((name, tuple(parameter.shape), sums)).encode())
    return digest.hexdigest()
