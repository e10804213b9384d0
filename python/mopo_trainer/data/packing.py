"""Sequences of tokens as flat tensors, and their layout in rows that enter the model: on the CPU, without loops.

Everything here is index arithmetic over ragged sequences; the packed batch then goes to the device once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

IGNORE_INDEX = -100

TokenSequence: TypeAlias = tuple[Sequence[int], int]  # input_ids of prompt and response, number of prompt tokens


@dataclass(frozen=True)
class SequenceBatch:
    """B ragged sequences, one behind the other; no loader moves it to a device."""

    ids: Tensor  # [T] tokens of prompt and response
    lengths: Tensor  # [B]
    prompts: Tensor  # [B] tokens of the prompt

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> SequenceBatch:
        ids = list(chain.from_iterable(ids for ids, _ in sequences))
        lengths, prompts = [len(ids) for ids, _ in sequences], [prompt for _, prompt in sequences]
        return cls(*(torch.tensor(x, dtype=torch.int64) for x in (ids, lengths, prompts)))

    @property
    def starts(self) -> Tensor:  # [B]
        return self.lengths.cumsum(0) - self.lengths

    def take(self, index: Tensor) -> SequenceBatch:
        """The sequences at `index`, in that order."""
        lengths = self.lengths[index]
        places = _places(lengths) + self.starts[index].repeat_interleave(lengths)
        return SequenceBatch(self.ids[places], lengths, self.prompts[index])


@dataclass(frozen=True)
class GroupBatch:
    """What the collator hands to a training step: sequences, and whose labels they have."""

    sequences: SequenceBatch
    response: Tensor  # [B] index among all responses of the data set
    group: Tensor  # [B] index of the row in the batch

    @property
    def groups(self) -> int:
        return int(self.group[-1]) + 1 if len(self.group) else 0


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, GroupBatch]:
    """A batch of groups (see `tokens.tokenize_groups`) as flat sequences."""
    sequences = [pair for row in rows for pair in zip(row["input_ids"], row["prompt_tokens"], strict=True)]
    sizes, first = (
        torch.tensor([(len(row["input_ids"]), row["first_response"]) for row in rows], dtype=torch.int64).view(-1, 2).T
    )
    group = torch.arange(len(rows)).repeat_interleave(sizes)
    response = first[group] + _places(sizes)
    return {"batch": GroupBatch(SequenceBatch.of(sequences), response, group)}


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
    tokens: int  # that enter the model, padding aside
    is_shared: bool  # some row holds several responses

    def to(self, device: torch.device) -> PackedSequences:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segment=self.segment.to(device),
            source=self.source.to(device),
            target=self.target.to(device),
        )

    def model_inputs(self, attention: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face model; shared prompts need attention that takes a mask per query."""
        if not self.is_shared:
            return {"input_ids": self.input_ids, "attention_mask": (self.segment >= 0).long()}
        query, key = self.segment[:, None, :, None], self.segment[:, None, None, :]
        mask = ((key == 0) | (key == query)).tril()  # [R, 1, T, T]
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": self.input_ids, "attention_mask": mask, "position_ids": self.position_ids}


def pack(sequences: SequenceBatch, row_of: Tensor | None, pad_token_id: int) -> PackedSequences:
    """Lay sequences out in rows; neighbours with equal `row_of` share a row and must share the prompt.

    None gives every sequence a row of its own.
    """
    lengths, prompts = sequences.lengths, sequences.prompts
    is_first = torch.ones_like(lengths, dtype=torch.bool)
    if row_of is not None:
        is_first[1:] = row_of[1:] != row_of[:-1]
    row = is_first.cumsum(0) - 1
    responses = lengths - prompts
    skipped = torch.where(is_first, 0, prompts)  # the row's first sequence brings the prompt
    widths = lengths - skipped
    before = widths.cumsum(0) - widths
    column = before - before[is_first][row]  # where a sequence's own tokens begin in its row
    segment = torch.arange(len(lengths)) - is_first.nonzero().squeeze(-1)[row] + 1

    place = _places(widths)
    position = place + skipped.repeat_interleave(widths)
    shape = int(row[-1]) + 1, int((column + widths).max())
    cell = (row * shape[1] + column).repeat_interleave(widths) + place
    tokens = sequences.ids[sequences.starts.repeat_interleave(widths) + position]
    own = torch.where(position < prompts.repeat_interleave(widths), 0, segment.repeat_interleave(widths))

    at = _places(responses)  # token of a response
    reply = (column + prompts - skipped - 1).repeat_interleave(responses) + at  # the position before it
    reply = torch.where(at == 0, prompts.repeat_interleave(responses) - 1, reply)
    source = (row * shape[1]).repeat_interleave(responses) + reply
    target = sequences.ids[(sequences.starts + prompts).repeat_interleave(responses) + at]
    reply_shape = len(lengths), int(responses.max())
    reply_cell = torch.arange(len(lengths)).repeat_interleave(responses) * reply_shape[1] + at
    return PackedSequences(
        input_ids=_filled(shape, pad_token_id, cell, tokens),
        position_ids=_filled(shape, 0, cell, position),
        segment=_filled(shape, -1, cell, own),
        source=_filled(reply_shape, 0, reply_cell, source),
        target=_filled(reply_shape, IGNORE_INDEX, reply_cell, target),
        tokens=int(widths.sum()),
        is_shared=not bool(is_first.all()),
    )


def _places(lengths: Tensor) -> Tensor:
    """0 … n − 1 for each length n, one after the other."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def _filled(shape: tuple[int, int], value: int, cells: Tensor, values: Tensor) -> Tensor:
    return torch.full((shape[0] * shape[1],), value).index_copy(0, cells, values).view(shape)
