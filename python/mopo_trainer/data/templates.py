"""Chat templates: the text that a model sees before its reply, and the text of a reply as the model would write it.

The prompt is rendered with the template's generation prompt, which is what the model sees when it is asked; a response
is what follows, up to the special token that ends its turn. Templates of thinking models open the reasoning in the
generation prompt (`<think>`). There a reply continues it: with its reasoning (in `reasoning_content`, `reasoning` or
`thinking`, or before `</think>` in its content), the closing tag and the answer; a reply without reasoning closes the
tag at once. Where the generation prompt has closed the reasoning already, the reply is its answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from mopo_trainer.data.errors import DataError, one_line
from mopo_trainer.data.remarks import Remarks
from mopo_trainer.data.special_tokens import SpecialTokens
from mopo_trainer.data.texts import without_nulls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
NAME = r"[\w:]*think\w*"  # of <think>, <seed:think>, [THINK], ◁think▷
OPENED = re.compile(rf"([<\[◁]{NAME}[>\]▷])(\s*)\Z", re.I)
CLOSED = re.compile(rf"(?:[<\[◁]{NAME}[>\]▷]\s*)?([<\[◁]/{NAME}[>\]▷])\s*\Z", re.I)
OWN = re.compile(rf"\s*([<\[◁]{NAME}[>\]▷])", re.I)


class Thinking(NamedTuple):
    """What a generation prompt says about reasoning with its last tag."""

    base: str  # the generation prompt before its tags
    opened: str  # the tag it opens, "" if it has closed it again
    space: str  # behind the opened tag
    close: str  # the closing tag


class Reply(NamedTuple):
    """The content of a reply, taken apart."""

    reasoning: str  # "" if it has none
    thought: str  # what continues an opened tag: the reasoning as it is written, the closing tag, what separates both
    answer: str


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer; what is unusual goes into `remarks`."""

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    remarks: Remarks

    def render(self, prompt: Messages, responses: Sequence[Messages]) -> tuple[str, list[str]]:
        """The prompt's text with its generation prompt, and what every response adds to it.

        Raises:
            DataError: no chat template, one that refuses or leaves out messages, or one whose replies do not follow its
                generation prompt.
        """
        self._check()
        start = self._apply(prompt, add_generation_prompt=True)
        for message in prompt:
            self._note_control(message)
            if not _has(start, _content(message)):
                self.remarks.note("left out", f"{message['role']}: {_content(message)[:40]!r}")
        if "strftime_now" in str(self.tokenizer.chat_template):
            self.remarks.note("date")
        return start, [self._render_reply(prompt, response, start) for response in responses]

    def _check(self) -> None:
        template = self.tokenizer.chat_template
        if not template:
            raise DataError("messages need a chat template and the tokenizer has none; set one or write plain text")
        if isinstance(template, dict) and "default" not in template:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none of them is called "
                "default; set tokenizer.chat_template to the one to use"
            )

    def _apply(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                without_nulls(messages), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(f"the chat template refuses the messages ({one_line(error)}); mend their roles") from None

    def _render_reply(self, prompt: Messages, response: Messages, start: str) -> str:
        first, *others = [*response[:-1], self._without_end(response[-1])]
        for message in (first, *others):
            self._note_control(message)
            if message["role"] != "assistant":
                self.remarks.note("other turns", message["role"])
        thinking = _thinking(start)
        reply = _take_apart(first, thinking)
        if thinking:
            first = {key: value for key, value in first.items() if key not in REASONING_KEYS}
            first["content"] = reply.answer
            if thinking.opened and reply.reasoning and thinking.close in reply.thought:
                first["reasoning_content"] = reply.reasoning
        added = _added(self._turns([*prompt, first, *others]), start, thinking, reply)
        if added is None:
            raise DataError(
                f"the chat template renders the prompt alone as {start[-40:]!r} but not so before a response; "
                "use a template in which every reply follows the generation prompt"
            )
        self._look_at(added, reply, thinking)
        return added

    def _without_end(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message without the special tokens at its end, which the template writes."""
        return {**message, "content": self.special.without_end(_content(message))} if _content(message) else message

    def _turns(self, messages: Messages) -> str:
        """The rendered messages up to the special token that ends the last turn.

        The line break that templates write behind it is no part of the reply, nor is the EOS that Phi-3's writes behind
        that, where the conversation ends but no reply does.
        """
        whole = self._apply(messages)
        end = self.special.end_of(whole)
        if not end:
            return whole
        whole = whole.rstrip()
        turns = whole.removesuffix(end)
        if turns[-1:].isspace() and self.special.end_of(turns):
            longer = self._apply(messages, add_generation_prompt=True)
            if longer.startswith(turns) and not longer.startswith(whole):
                return turns.rstrip()
        return whole

    def _note_control(self, message: Mapping[str, Any]) -> None:
        found = self.special.inside.search(_content(message))
        if found:
            self.remarks.note("control", repr(found[0]))

    def _look_at(self, added: str, reply: Reply, thinking: Thinking | None) -> None:
        if not _has(added, reply.answer):
            raise DataError(
                f"the chat template leaves out the reply's text {reply.answer[:40]!r}; "
                "use one that writes contents that are text (those of vision models may want lists of parts)"
            )
        if reply.reasoning and not _has(added, reply.reasoning):
            self.remarks.note("reasoning left out", "closes it before the reply" if thinking else "does not write it")
        opened = thinking.opened if thinking else "".join(OWN.findall(added)[:1])
        if opened and not reply.reasoning:
            self.remarks.note("no reasoning", opened)
        if not self.special.end_of(added):
            self.remarks.note("no end", repr(added[-20:]))


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _has(rendered: str, text: str) -> bool:
    """Whether a rendered text still has the last word of what went in; templates strip, and drop old reasoning."""
    return not text.strip() or text.split()[-1] in rendered


def _closing(tag: str) -> str:
    return f"{tag[0]}/{tag[1:]}"


def _thinking(start: str) -> Thinking | None:
    """How the generation prompt ends; None where it says nothing about reasoning."""
    if opened := OPENED.search(start):
        return Thinking(start[: opened.start()], opened[1], opened[2], _closing(opened[1]))
    if closed := CLOSED.search(start):
        return Thinking(start[: closed.start()], "", "", closed[1])
    return None


def _take_apart(message: Mapping[str, Any], thinking: Thinking | None) -> Reply:
    """Reasoning and answer of a reply: from its own key, or from its content before the closing tag.

    Content may lack the opening tag, as sampled text does where the prompt has opened it, or the closing one, as text
    does that was cut within its reasoning.
    """
    content = _content(message)
    own = OWN.match(content)
    close = thinking.close if thinking else _closing(own[1]) if own else ""
    head, closed, answer = content.partition(close) if close else ("", "", content)
    if not closed:
        head, answer = (content, "") if own and thinking else ("", content)
    head = (head[own.end() :] if own else head).removeprefix(thinking.space if thinking else "")
    separator = answer[: len(answer) - len(answer.lstrip())] if closed else ""
    answer = answer[len(separator) :]
    given = next((str(message[key]).strip() for key in REASONING_KEYS if message.get(key)), "")
    if given or not head.strip():
        return Reply(given, f"{given}\n{close}\n\n", answer)
    return Reply(head.strip(), head + closed + separator, answer)


def _added(whole: str, start: str, thinking: Thinking | None, reply: Reply) -> str | None:
    """What a reply adds to the generation prompt; None where it does not follow it."""
    if thinking is None or not thinking.opened:
        if whole.startswith(start):
            return whole[len(start) :]
        if thinking is None or not whole.startswith(thinking.base):
            return None
        return _without_block(whole[len(thinking.base) :], thinking)
    if not whole.startswith(thinking.base):
        return None
    rest = whole[len(thinking.base) :]
    block, closed, _ = rest.partition(thinking.close)
    if closed and block.startswith(thinking.opened) and _has(block, reply.reasoning):
        return rest.removeprefix(thinking.opened).removeprefix(thinking.space)
    return reply.thought + _without_block(rest, thinking)


def _without_block(rest: str, thinking: Thinking) -> str:
    """A rendered reply without the reasoning, or the tag alone, that it begins with."""
    own = OWN.match(rest)
    if not own:
        return rest
    _, closed, answer = rest.partition(thinking.close)
    return answer.lstrip() if closed else rest[own.end() :].removeprefix(thinking.space)
