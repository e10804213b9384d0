"""What is unusual about the texts of a data set: counted while they are tokenised, said once, one line each."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)

REMARKS = {
    "glued": "{count} of {prompts} plain prompts run into their responses ({example}) although the tokenizer has a "
    "chat template; as_chat renders them as chats, or let the prompts end in a space or line break",
    "no end": "{count} of {responses} responses end in no special token ({example}): nothing teaches the model to "
    "stop; give the tokenizer an eos_token, or a chat template that closes replies with a special token",
    "control": "{count} texts hold special tokens inside (first: {example}); they become those tokens and are not "
    "read as text; remove them unless they are meant",
    "date": "the chat template writes today's date (strftime_now): tokens, and with them cached reference log-probs, "
    "change from day to day; put a fixed date into the template or a system message into the prompts",
    "no reasoning": "{count} of {responses} replies have no reasoning: {example}, which the chat template opens, is "
    "closed at once",
    "reasoning left out": "the reasoning of {count} of {responses} replies is left out: the chat template "
    "{example}; use a template that opens or writes it to train on it",
    "left out": "{count} messages of prompts are left out by the chat template (first: {example}); move their text "
    "into a message that it writes",
    "other turns": "{count} of {responses} responses hold turns of others than the assistant (first: {example}); "
    "they are trained like its own",
    "apart": "{count} of {responses} responses begin with tokens that do not read as their text behind the prompt "
    "({example}); let prompts end, or responses begin, at a space",
}


class Remarks:
    """Counts of what is worth a word."""

    def __init__(self) -> None:
        self.prompts = 0
        self.responses = 0
        self.cut_prompts = 0
        self.cut_responses = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def note(self, remark: str, example: object = "") -> None:
        """Count one case of a remark; the first example is shown."""
        self._counts[remark] += 1
        self._examples.setdefault(remark, str(example))

    def say(self, *, max_length: int | None, max_prompt_length: int | None) -> None:
        """Log every remark that was noted, and how many texts were cut to fit the lengths."""
        for remark, count in self._counts.items():
            example = self._examples[remark]
            text = REMARKS[remark].format(count=count, example=example, prompts=self.prompts, responses=self.responses)
            logger.warning("%s", text)
        cut = [
            f"{count} of {total} {what}"
            for count, total, what in (
                (self.cut_prompts, self.prompts, "prompts lost their beginning"),
                (self.cut_responses, self.responses, "responses lost their end"),
            )
            if count
        ]
        if cut:
            lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
            limits = ", ".join(f"{name}={most}" for name, most in lengths.items() if most is not None)
            logger.warning("cut to fit %s: %s; raise the lengths to keep them whole", limits, ", ".join(cut))
