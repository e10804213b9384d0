"""Tokens of groups: every response behind its prompt, once, before training."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor

from mopo_trainer.data.labels import labels
from mopo_trainer.data.packing import TokenSequence
from mopo_trainer.data.sources import DataError, one_line
from mopo_trainer.data.texts import Text, without_nulls

if TYPE_CHECKING:  # `mopo solve` reads labels without waiting for transformers
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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

    def first(self, count: int) -> TokenizedGroups:
        """The first `count` groups."""
        dataset = self.dataset.select(range(min(count, len(self.dataset))))
        responses = sum(map(len, dataset["input_ids"]))
        return TokenizedGroups(dataset, self.win_rate[:responses], self.group[:responses])

    def sequences(self) -> list[TokenSequence]:
        """(input_ids, prompt_tokens) of every response."""
        return [pair for row in self.dataset for pair in zip(row["input_ids"], row["prompt_tokens"], strict=True)]

    def longest_group(self) -> list[TokenSequence]:
        """The longest sequence and another response to its prompt, the longest first."""
        lengths = pc.list_value_length(pc.list_flatten(self._tokens()))
        row = self.dataset[int(self.group[pc.index(lengths, pc.max(lengths)).as_py()])]
        pairs = zip(row["input_ids"], row["prompt_tokens"], strict=True)
        return sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)[:2]

    def largest_token(self) -> int:
        return pc.max(pc.list_flatten(pc.list_flatten(self._tokens()))).as_py()

    def _tokens(self) -> pa.ChunkedArray:
        return self.dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]


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


def tokenize_group(
    prompt: Text,
    responses: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
    as_chat: bool = False,
) -> list[tuple[list[int], int]]:
    """Tokenise every response behind its prompt, as TRL does: (input_ids, num_prompt_tokens) per response.

    Messages go through the chat template, the prompt with its generation prompt; plain text is concatenated and closed
    by the end-of-sequence token. All sequences begin with the same prompt tokens, and the response is exactly what
    follows them. Long prompts lose their beginning, long responses their end (reported once).

    Args:
        max_prompt_length: most tokens of a prompt; None keeps all.
        max_length: most tokens of prompt and response together; None keeps all.
        as_chat: make plain text a user's message and the assistant's reply.

    Raises:
        DataError: no chat template, one that refuses the messages or does not continue its generation prompt, or
            lengths that leave no room for the response.
    """
    if max_prompt_length is not None and max_prompt_length < 1:
        raise DataError(f"max_prompt_length={max_prompt_length}: give at least 1, or None to keep whole prompts")
    if as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        responses = [[{"role": "assistant", "content": response}] for response in responses]
    is_plain = isinstance(prompt, str)  # a chat template writes the special tokens itself
    start, endings = (_render_plain if is_plain else _render_chat)(prompt, responses, tokenizer)
    texts = [start, *(start + ending for ending in endings)]
    prompt_ids, *sequences = tokenizer(texts, add_special_tokens=is_plain, verbose=False)["input_ids"]
    # Tokens that merge across the boundary would change the prompt: such a response is tokenised by itself.
    response_ids = [
        sequence[len(prompt_ids) :]
        if sequence[: len(prompt_ids)] == prompt_ids
        else tokenizer(ending, add_special_tokens=False, verbose=False)["input_ids"]
        for sequence, ending in zip(sequences, endings, strict=True)
    ]
    if max_prompt_length is not None:
        prompt_ids = prompt_ids[-max_prompt_length:]
    room = None if max_length is None else max_length - len(prompt_ids)
    if room is not None and room <= 0:
        raise DataError(
            f"the prompt's {len(prompt_ids)} tokens leave no room for a response in max_length={max_length}; "
            "set max_prompt_length below max_length"
        )
    if room is not None and max(map(len, response_ids)) > room:
        _report_cut(max_length)
    return [(prompt_ids + ids[:room], len(prompt_ids)) for ids in response_ids]


def _render_plain(prompt: Any, responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The prompt, and every response with the end-of-sequence token behind it."""
    eos = tokenizer.eos_token or ""
    return prompt, [response if response.endswith(eos) else response + eos for response in responses]


def _render_chat(prompt: Any, responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The rendered prompt with its generation prompt, and what each response adds, up to its end-of-sequence token."""
    if not tokenizer.chat_template:
        raise DataError("messages need a chat template and the tokenizer has none; set one or write plain text")
    conversations = [without_nulls([*prompt, *response]) for response in responses]
    try:
        start = tokenizer.apply_chat_template(without_nulls(prompt), add_generation_prompt=True, tokenize=False)
        rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages ({one_line(error)}); mend their roles") from None
    endings = []
    for whole in rendered:
        if not whole.startswith(start):
            raise DataError(
                f"the chat template renders the prompt alone as {start[-40:]!r} but not so before a response; "
                "use a template in which every reply follows the generation prompt"
            )
        ending = whole[len(start) :]
        reply, eos, rest = ending.rpartition(tokenizer.eos_token or "\0")
        endings.append(reply + eos if eos and not rest.strip() else ending)  # templates add a newline after it
    return start, endings


@cache
def _report_cut(max_length: int) -> None:
    logger.warning("at least one response was cut to fit max_length=%d; raise it to keep them whole", max_length)
