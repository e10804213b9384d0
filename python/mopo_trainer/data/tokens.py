"""Tokens of groups: every response behind its prompt, once, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from mopo_trainer.data.errors import DataError
from mopo_trainer.data.labels import labels
from mopo_trainer.data.packing import TokenSequence
from mopo_trainer.data.remarks import Remarks
from mopo_trainer.data.special_tokens import SpecialTokens
from mopo_trainer.data.templates import ChatTemplate
from mopo_trainer.data.texts import Text

if TYPE_CHECKING:  # `mopo solve` reads labels without waiting for transformers
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("", "\n", ".", "a", "0", "(")  # texts behind which a response is tokenised that would merge with its prompt


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
        """The responses to the prompt of the longest sequence, the longest last."""
        return self._responses(int(self.group[self._lengths().argmax()]))

    def widest_group(self) -> list[TokenSequence]:
        """The prompt whose responses behind it, one after the other, take most tokens; the longest last."""
        prompts = torch.tensor(pc.list_flatten(self._column("prompt_tokens")).to_numpy())
        responses = self.group.bincount(self._lengths() - prompts).long()
        prompt = torch.zeros_like(responses).scatter(0, self.group, prompts)
        return self._responses(int((prompt + responses).argmax()))

    def shortest(self) -> TokenSequence:
        return self._responses(int(self.group[self._lengths().argmin()]))[0]

    def _responses(self, row: int) -> list[TokenSequence]:
        chosen = self.dataset[row]
        return sorted(zip(chosen["input_ids"], chosen["prompt_tokens"], strict=True), key=lambda pair: len(pair[0]))

    def _lengths(self) -> Tensor:  # [M]
        return torch.tensor(pc.list_value_length(pc.list_flatten(self._column("input_ids"))).to_numpy())

    def largest_token(self) -> int:
        return pc.max(pc.list_flatten(pc.list_flatten(self._column("input_ids")))).as_py()

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.dataset.select_columns([name]).with_format("arrow")[:][name]


def tokenize_groups(groups: Dataset, objectives: Sequence[str], tokenizer: Any, **options: Any) -> TokenizedGroups:
    """Tokenise groups (see `mopo_trainer.data`) once; `options` are those of `tokenize_group`.

    What is unusual about the texts or was cut is counted over all groups and logged, one line for each kind.
    """
    win_rate, group = labels(groups, objectives)
    tokenizing = Tokenizing.by(tokenizer, **options)

    def tokenize(row: Mapping[str, Any], index: int) -> dict[str, list]:
        try:
            sequences = tokenizing.group(row["prompt"], row["responses"])
        except DataError as error:
            raise DataError(f"group {index}: {error}") from None
        return {"input_ids": [ids for ids, _ in sequences], "prompt_tokens": [prompt for _, prompt in sequences]}

    dataset = groups.map(
        tokenize, with_indices=True, remove_columns=groups.column_names, desc="Tokenising", keep_in_memory=True
    )
    tokenizing.say()
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
    """Tokenise every response behind its prompt: (input_ids, num_prompt_tokens) per response.

    All sequences begin with the same prompt tokens, those that the model sees when it is asked, and the response is
    exactly what follows. Together they decode to the prompt and the response: where a response would merge with the
    end of the prompt it has the tokens that it has behind another text.

    Messages go through the chat template (`templates`), which writes all special tokens itself. Plain text gets what
    the tokenizer writes before a text (BOS), once, also where the prompt begins with it, and one EOS behind the
    response, none where it ends with another special token, as rendered chats do.

    Long prompts lose their beginning but for BOS, a chat its first turns too; long responses lose their end. A prompt
    may have `max_prompt_length` tokens. Where that is None or leaves no room in `max_length`, it may have what the
    longest response of the group leaves of `max_length`, at least half of it.

    Args:
        max_prompt_length: most tokens of a prompt; None: as many as `max_length` allows.
        max_length: most tokens of prompt and response together; None keeps all.
        as_chat: make plain text a user's message and the assistant's reply.

    Raises:
        DataError: no chat template or one that does not fit (`templates.ChatTemplate.render`), a prompt or response
            without tokens, impossible lengths, a tokenizer that adds special tokens where it is asked not to.
    """
    tokenizing = Tokenizing.by(tokenizer, max_prompt_length=max_prompt_length, max_length=max_length, as_chat=as_chat)
    sequences = tokenizing.group(prompt, responses)
    tokenizing.say()
    return sequences


@dataclass(frozen=True)
class Tokenizing:
    """A tokenizer with the options of `tokenize_group`, and what it found worth a remark so far."""

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    max_prompt_length: int | None
    max_length: int | None
    as_chat: bool
    remarks: Remarks

    @classmethod
    def by(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int | None,
        max_length: int | None,
        as_chat: bool = False,
    ) -> Tokenizing:
        if max_prompt_length is not None and max_prompt_length < 1:
            raise DataError(f"max_prompt_length={max_prompt_length}: give at least 1, or None to keep whole prompts")
        if max_length is not None and max_length < 2:
            raise DataError(f"max_length={max_length}: give at least 2, or None to keep whole responses")
        return cls(tokenizer, SpecialTokens.of(tokenizer), max_prompt_length, max_length, as_chat, Remarks())

    def say(self) -> None:
        self.remarks.say(max_length=self.max_length, max_prompt_length=self.max_prompt_length)

    def group(self, prompt: Text, responses: Sequence[Text]) -> list[tuple[list[int], int]]:
        self.remarks.prompts += 1
        self.remarks.responses += len(responses)
        if self.as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            responses = [[{"role": "assistant", "content": response}] for response in responses]
        found, endings = (self._plain if isinstance(prompt, str) else self._chat)(prompt, responses)
        for name, ids in (("prompt", found), *((f"response {i}", ids) for i, ids in enumerate(endings))):
            if not ids:
                raise DataError(f"the {name} has no tokens; write text that the tokenizer can read")
        return self._cut(found, endings)

    def _chat(self, prompt: Any, responses: Sequence[Any]) -> tuple[list[int], list[list[int]]]:
        start, endings = ChatTemplate(self.tokenizer, self.special, self.remarks).render(prompt, responses)
        return self._tokens(start, endings, split_special_tokens=False)

    def _plain(self, prompt: Any, responses: Sequence[Any]) -> tuple[list[int], list[list[int]]]:
        texts = [self.special.without_end(response, only=self.special.eos) for response in responses]
        is_ended = [bool(self.special.end_of(text)) for text in texts]
        texts = [text.rstrip() if ended else text for text, ended in zip(texts, is_ended, strict=True)]
        self._look_at(prompt, texts)
        ids, endings = self._tokens(prompt, texts)
        before, closing = self.special.before, self.special.closing
        while before and ids[: len(before)] == before:
            ids = ids[len(before) :]
        return before + ids, [
            ending if ended else ending + closing for ending, ended in zip(endings, is_ended, strict=True)
        ]

    def _look_at(self, prompt: str, texts: list[str]) -> None:
        """Remarks on plain text."""
        special, note = self.special, self.remarks.note
        if self.tokenizer.chat_template and not special.controls.search(prompt) and not prompt[-1:].isspace():
            glued = [text for text in texts if text and not text[0].isspace()]
            if glued:
                note("glued", repr(f"{prompt[-12:]}{glued[0][:12]}"))
        for text in texts:
            if found := special.inside.search(text.removesuffix(special.end_of(text))):
                note("control", repr(found[0]))
            if not special.closing and not special.end_of(text):
                note("no end", repr(text[-20:]))

    def _tokens(self, start: str, endings: Sequence[str], **options: Any) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt, and those of each response behind it, without any that the tokenizer adds itself."""
        prompt, *sequences = self._encode([start, *(start + ending for ending in endings)], **options)
        return prompt, [
            sequence[len(prompt) :]
            if sequence[: len(prompt)] == prompt
            else self._apart(prompt, sequence, ending, **options)
            for sequence, ending in zip(sequences, endings, strict=True)
        ]

    def _apart(self, prompt: list[int], sequence: list[int], ending: str, **options: Any) -> list[int]:
        """Tokens of a response whose beginning would merge with the prompt's end, such that both decode to the text.

        By itself, or behind a text that it does not merge with: some tokenizers write a space before a text's
        beginning, or treat it as that of a word.
        """
        text = self._decode(sequence)
        for anchor in ANCHORS:
            before, both = self._encode([anchor, anchor + ending], **options)
            ids = both[len(before) :]
            if both[: len(before)] == before and self._decode(prompt + ids) == text:
                return ids
        self.remarks.note("apart", repr(ending[:20]))
        return self._encode([ending], **options)[0]

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _cut(self, prompt: list[int], responses: list[list[int]]) -> list[tuple[list[int], int]]:
        most = self._most_prompt_tokens(max(map(len, responses)))
        if most is not None and len(prompt) > most:
            self.remarks.cut_prompts += 1
            before = self.special.before or [self.tokenizer.bos_token_id]
            kept = before[:most] if prompt[: len(before)] == before else []
            prompt = kept + prompt[len(prompt) - most + len(kept) :]
        room = None if self.max_length is None else self.max_length - len(prompt)
        self.remarks.cut_responses += sum(room is not None and len(ids) > room for ids in responses)
        return [(prompt + ids[:room], len(prompt)) for ids in responses]

    def _most_prompt_tokens(self, longest: int) -> int | None:
        """Of a group whose longest response has so many tokens."""
        if self.max_length is None or (self.max_prompt_length or self.max_length) < self.max_length:
            return self.max_prompt_length
        return max(self.max_length - longest, self.max_length // 2)
