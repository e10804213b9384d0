"""Special tokens: what a tokenizer writes around a text by itself, and which a text holds already."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mopo_trainer.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ENDS = ("bos_token", "cls_token", "unk_token", "pad_token", "mask_token")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer."""

    before: list[int]  # what it writes before every text by itself, once: BOS, [CLS] or nothing
    closing: list[int]  # what closes a response of plain text: EOS, without one what the tokenizer writes behind texts
    eos: str | None
    ends: tuple[str, ...]  # those that may end a turn
    inside: re.Pattern[str]  # finds any of them in a text
    controls: re.Pattern[str]  # finds those and the other added tokens that the chat template writes

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        before, behind = _written_around(tokenizer)
        template = str(tokenizer.chat_template or "")
        added = tokenizer.added_tokens_decoder.values()
        texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        written = {str(token) for token in added if str(token) in template and not str(token).isspace()}
        no_ends = {getattr(tokenizer, name) for name in NO_ENDS} - {tokenizer.eos_token}
        return cls(
            before=list(dict.fromkeys(before)),
            closing=behind if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
            eos=tokenizer.eos_token,
            ends=tuple(sorted(texts - no_ends)),
            inside=_any_of(texts),
            controls=_any_of(texts | written),
        )

    def end_of(self, text: str) -> str:
        """The special token that a text ends with, whitespace behind it apart; "" if there is none."""
        text = text.rstrip()
        return max((end for end in self.ends if text.endswith(end)), key=len) if text.endswith(self.ends) else ""

    def without_end(self, text: str, *, only: str | None = None) -> str:
        """A text without the special tokens at its end (without those that are `only`), and whitespace behind them."""
        while (end := self.end_of(text)) and only in (None, end):
            text = text.rstrip().removesuffix(end)
        return text


def _written_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer writes before and behind a text by itself."""
    for text in ("a", "0", ".", "的"):  # some vocabulary may lack some of them
        bare, whole = (tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
        if bare:
            break
    size = len(bare)
    found = [start for start in range(len(whole) - size + 1) if whole[start : start + size] == bare]
    written = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {tokenizer.unk_token_id}
    if not bare or not found or written & set(bare):
        raise DataError(
            f"the tokenizer reads {text!r} as {whole} and with add_special_tokens=False as {bare}; "
            "use one that writes special tokens around a text only where it is asked to"
        )
    return whole[: found[0]], whole[found[0] + size :]


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
