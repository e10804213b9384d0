"""Log-probabilities of whole responses under a model: reference passes, lag refreshes, evaluation.

Responses are flattened over groups; `first_response` says where a group's responses start.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, TypeAlias

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

TokenSequence: TypeAlias = tuple[Sequence[int], int]  # input_ids of prompt and response, number of prompt tokens


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

    def sequences(self) -> list[TokenSequence]:
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
    sequences = [ids for row in rows for ids in row["input_ids"]]
    lengths = torch.tensor([len(ids) for ids in sequences])
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    group = torch.arange(len(rows)).repeat_interleave(sizes)
    offset = torch.arange(len(sequences)) - (sizes.cumsum(0) - sizes)[group]
    return {
        "input_ids": _right_pad(sequences, pad_token_id),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "prompt_tokens": torch.tensor([prompt for row in rows for prompt in row["prompt_tokens"]]),
        "response": torch.tensor([row["first_response"] for row in rows])[group] + offset,
        "group": group,
    }


def batch_sequences(batch: Mapping[str, Tensor], index: Tensor | None) -> list[TokenSequence]:
    """The sequences of a collated batch at `index` (all for None), without padding."""
    chosen = {name: batch[name] if index is None else batch[name][index] for name in batch if name != "group"}
    lengths = chosen["attention_mask"].sum(-1).tolist()
    ids = chosen["input_ids"].tolist()
    prompts = chosen["prompt_tokens"].tolist()
    return [(row[:length], prompt) for row, length, prompt in zip(ids, lengths, prompts, strict=True)]


@dataclass(frozen=True)
class PackedSequences:
    """What enters the model: R rows, each a prompt with one or more of its responses behind it.

    Response j of a row (segment j; the prompt is 0, padding −1) attends to the prompt and to itself, and its positions
    count from the end of the prompt: exactly what it would see alone, while the prompt is computed once.
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    segment: Tensor  # [R, T]
    source: Tensor  # [S, L] position in the flat [R · T] whose hidden state predicts the token
    target: Tensor  # [S, L] the responses' tokens, IGNORE_INDEX behind them

    @property
    def tokens(self) -> int:
        """Tokens that enter the model, padding aside."""
        return int((self.segment >= 0).sum())

    def to(self, device: torch.device) -> PackedSequences:
        return PackedSequences(*(getattr(self, f.name).to(device) for f in fields(self)))

    def model_inputs(self, attention: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face model.

        Raises ValueError for shared prompts where the attention implementation takes no mask per query.
        """
        if int(self.segment.max()) <= 1:
            return {"input_ids": self.input_ids, "attention_mask": (self.segment >= 0).long()}
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"share_prompt needs attn_implementation 'sdpa' or 'eager'; the model has {attention!r}")
        query, key = self.segment[:, None, :, None], self.segment[:, None, None, :]
        mask = ((key == 0) | (key == query)).tril()  # [R, 1, T, T]
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}


def pack(sequences: Sequence[TokenSequence], row_of: Sequence[int] | None, pad_token_id: int) -> PackedSequences:
    """Lay out (input_ids, prompt_tokens) pairs; neighbours with equal `row_of` share a row and must share the prompt.

    None gives every sequence a row of its own.
    """
    rows = [list(row) for _, row in groupby(range(len(sequences)), key=row_of.__getitem__ if row_of else None)]
    input_ids: list[list[int]] = []
    position_ids: list[list[int]] = []
    segment: list[list[int]] = []
    starts: list[tuple[int, int, int]] = []  # row, position of the response's first token, prompt_tokens
    for r, row in enumerate(rows):
        ids, prompt = sequences[row[0]]
        line, position, parts = list(ids[:prompt]), list(range(prompt)), [0] * prompt
        for j, i in enumerate(row, start=1):
            response = sequences[i][0][prompt:]
            starts.append((r, len(line), prompt))
            line += response
            position += range(prompt, prompt + len(response))
            parts += [j] * len(response)
        input_ids.append(line)
        position_ids.append(position)
        segment.append(parts)
    width = max(map(len, input_ids))
    source = [
        [r * width + prompt - 1, *range(r * width + start, r * width + start + len(ids) - prompt - 1)]
        for (r, start, prompt), (ids, _) in zip(starts, sequences, strict=True)
    ]
    return PackedSequences(
        input_ids=_right_pad(input_ids, pad_token_id),
        position_ids=_right_pad(position_ids, 0),
        segment=_right_pad(segment, -1),
        source=_right_pad(source, 0),
        target=_right_pad([ids[prompt:] for ids, prompt in sequences], IGNORE_INDEX),
    )


def _right_pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return padded


def response_hidden_states(model: nn.Module, plain: PreTrainedModel, packed: PackedSequences) -> Tensor:
    """Hidden states [S, L, H] that predict `packed.target`; `plain` is `model` without wrappers.

    The whole model is called, so that wrappers (DDP) see their forward pass; its head runs on one position only.
    """
    captured: list[Tensor] = []
    handle = plain.get_decoder().register_forward_hook(lambda module, args, output: captured.append(output[0]))
    keep_one = {"logits_to_keep": 1} if _takes_logits_to_keep(plain) else {}
    try:
        inputs = packed.model_inputs(plain.config._attn_implementation, plain.dtype)
        model(**inputs, use_cache=False, **keep_one)
    finally:
        handle.remove()
    return captured[0].flatten(0, 1)[packed.source]


def _takes_logits_to_keep(plain: PreTrainedModel) -> bool:
    base = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return "logits_to_keep" in inspect.signature(base.forward).parameters


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
    sequences: Sequence[TokenSequence],
    *,
    accelerator: Accelerator,
    batch_size: int,
    pad_token_id: int,
    row_of: Sequence[int] | None = None,
    backend: str | None = None,
    adapter_off: bool = False,
    description: str = "Log-probs",
) -> Tensor:  # [M]
    """log π(y|x), the sum over the response's tokens, of every response; float64 on the CPU, the same on every rank.

    `sequences` are (input_ids, prompt_tokens) pairs, those of equal `row_of` share their prompt's pass; `adapter_off`
    scores a peft model's base. Rows are taken longest first, `batch_size` sequences at a time, shared among the ranks.
    """
    plain = accelerator.unwrap_model(model)
    batches = _batches(sequences, row_of, batch_size)
    rank, world = accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, len(sequences), dtype=torch.float64)
    was_training = plain.training
    plain.eval()
    with plain.disable_adapter() if adapter_off else nullcontext():
        for i in tqdm(range(0, len(batches), world), desc=description, disable=not accelerator.is_local_main_process):
            indices = batches[(i + rank) % len(batches)]  # every rank runs as many forward passes as the others
            shared = [row_of[j] for j in indices] if row_of else None
            packed = pack([sequences[j] for j in indices], shared, pad_token_id).to(accelerator.device)
            hidden = response_hidden_states(model, plain, packed)
            head = LMHead.of(plain)
            with accelerator.autocast():
                logp = sequence_logprob(
                    hidden.to(head.weight.dtype), head.weight, packed.target, backend=backend, **head.options
                )
            total[0, indices] += logp.double().cpu()
            total[1, indices] += 1
    plain.train(was_training)
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum").cpu()
    return total[0] / total[1]


def _batches(sequences: Sequence[TokenSequence], row_of: Sequence[int] | None, batch_size: int) -> list[list[int]]:
    """Indices of sequences, whole rows together, longest rows first, up to `batch_size` (at least a row) a batch."""
    rows = [list(row) for _, row in groupby(range(len(sequences)), key=row_of.__getitem__ if row_of else None)]
    rows.sort(key=lambda row: sum(len(sequences[i][0]) for i in row), reverse=True)
    batches: list[list[int]] = []
    for row in rows:
        if not batches or len(batches[-1]) + len(row) > batch_size:
            batches.append([])
        batches[-1] += row
    return batches


def parameters_fingerprint(model: nn.Module, is_reference: Callable[[nn.Parameter], bool]) -> str:
    """Hash of the reference weights: names, shapes and, per parameter, its sum and absolute sum in float64."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_reference(parameter):
            values = parameter.detach()
            sums = (values.sum(dtype=torch.float64).item(), values.abs().sum(dtype=torch.float64).item())
            digest.update(repr((name, tuple(parameter.shape), sums)).encode())
    return digest.hexdigest()
