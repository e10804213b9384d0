"""What chat templates make of prompts and replies: thinking, ends of turns, what they leave out."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer

from mopo_trainer.data import DataError, tokenize_group

WHOLE = {"max_prompt_length": None, "max_length": None}
USER = "{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>\n"
ASK = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
PARSE = (  # as Qwen's templates find the reasoning
    "{% set c = m.content %}{% set r = '' %}{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
BLOCK = "<|assistant|>\n<think>\n{{ r }}\n</think>\n\n{{ c }}<|end|>\n"
EACH = "{% for m in messages %}"
STRIPPED = "{% set c = m.content.split('</think>')[-1] %}<|assistant|>{{ c }}<|end|>"
TEMPLATES = {
    "R1": EACH + USER + "{% else %}" + STRIPPED + ASK.replace("\n", "") + "<think>\n{% endif %}",
    "QwQ": EACH + USER + "{% else %}<|assistant|>\n{{ m.content }}<|end|>\n" + ASK + "<think>\n{% endif %}",
    "Qwen3-Thinking": EACH + USER + "{% else %}" + PARSE + BLOCK + ASK + "<think>\n{% endif %}",
    "Nemotron": EACH
    + USER
    + "{% else %}"
    + PARSE
    + "<|assistant|>\n<think>{% if r %}\n{{ r }}\n{% endif %}</think>{{ c }}<|end|>\n"
    + ASK
    + "<think>\n{% endif %}",
    "Magistral": (EACH + USER + "{% else %}<|assistant|>\n{{ m.content }}<|end|>\n" + ASK + "[THINK]{% endif %}"),
    "Qwen3": EACH + USER + "{% else %}" + PARSE + BLOCK + ASK + "{% endif %}",
    "Qwen3, thinking off": EACH + USER + "{% else %}" + PARSE + BLOCK + ASK + "<think>\n\n</think>\n\n{% endif %}",
    "off, history without": EACH
    + USER
    + "{% else %}<|assistant|>\n{{ m.content }}<|end|>\n"
    + ASK
    + "<think>\n\n</think>\n\n{% endif %}",
}
PLAIN = {"content": "Yes."}
OWN = {"content": "<think>\nHm\n</think>\n\nYes."}
TAIL = {"content": "Hm\n</think>\n\nYes.<|end|>\n"}
KEY = {"content": "Yes.", "reasoning_content": "Hm"}
OLD_KEY = {"content": "Yes.", "thinking": "Hm\n"}


def chat(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def replies(template, *messages, prompt=({"role": "user", "content": "Q?"},)):
    """The prompt's text, and that of each reply."""
    tokenizer = chat(template)
    responses = [[{"role": "assistant", **message}] for message in messages]
    sequences = tokenize_group(list(prompt), responses, tokenizer, **WHOLE)
    [start] = {tokenizer.decode(ids[:n]) for ids, n in sequences}
    assert start == tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    return start, [tokenizer.decode(ids[n:]) for ids, n in sequences]


CLOSED, THOUGHT = "\n</think>\n\nYes.<|end|>", "Hm\n</think>\n\nYes.<|end|>"


@pytest.mark.parametrize("name", ["R1", "QwQ", "Qwen3-Thinking"])
def test_replies_continue_the_reasoning_that_the_prompt_opens(name, caplog):
    start, found = replies(TEMPLATES[name], PLAIN, OWN, TAIL, KEY, OLD_KEY)
    assert start.endswith("<think>\n")
    assert found == [CLOSED, THOUGHT, THOUGHT, THOUGHT, THOUGHT]
    assert caplog.text.count("1 of 5 replies have no reasoning: <think>, which the chat template opens, is closed") == 1


def test_the_template_s_own_way_to_close_is_kept():
    _, found = replies(TEMPLATES["Nemotron"], PLAIN, OWN, KEY)
    assert found == ["</think>Yes.<|end|>", "Hm\n</think>Yes.<|end|>", "Hm\n</think>Yes.<|end|>"]


def test_other_tags_think_too():
    own = {"content": "[THINK]Hm[/THINK]Yes."}
    assert replies(TEMPLATES["Magistral"], PLAIN, own)[1] == ["\n[/THINK]\n\nYes.<|end|>", "Hm[/THINK]Yes.<|end|>"]


@pytest.mark.parametrize("name", ["R1", "QwQ", "Qwen3-Thinking"])
def test_reasoning_that_was_cut_off_stays_open(name):
    _, found = replies(TEMPLATES[name], {"content": "<think>\nHm, that"}, PLAIN)
    assert found == ["Hm, that<|end|>", CLOSED]


def test_a_hybrid_s_reply_writes_its_block_itself(caplog):
    _, found = replies(TEMPLATES["Qwen3"], PLAIN, OWN, KEY)
    assert found == ["<think>\n" + text for text in (CLOSED, THOUGHT, THOUGHT)]
    assert "1 of 3 replies have no reasoning" in caplog.text


@pytest.mark.parametrize("name", ["Qwen3, thinking off", "off, history without"])
def test_where_thinking_is_off_the_reply_is_its_answer(name, caplog):
    _, found = replies(TEMPLATES[name], PLAIN, OWN, KEY)
    assert found == ["Yes.<|end|>"] * 3
    assert "the reasoning of 2 of 3 replies is left out: the chat template closes it before the reply" in caplog.text


def test_reasoning_that_a_template_does_not_write_is_said(caplog):
    assert replies(CHAT_TEMPLATE, KEY, OWN)[1] == ["Yes.<|end|>", OWN["content"] + "<|end|>"]
    assert "the reasoning of 1 of 2 replies is left out: the chat template does not write it" in caplog.text


def test_channels_are_followed():
    harmony = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}<|start|>assistant<|channel|>analysis"
        "<|message|>{{ m.thinking }}<|stop|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "<|end|>{% else %}<|start|>user<|message|>{{ m.content }}<|stop|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    final = "<|channel|>final<|message|>Yes.<|end|>"
    assert replies(harmony, PLAIN, {**PLAIN, "thinking": "Hm"})[1] == [
        final,
        "<|channel|>analysis<|message|>Hm<|stop|><|start|>assistant" + final,
    ]


# ------------------------------------------------------------------------------------------------------ ends of turns


@pytest.mark.parametrize("content", ["Yes.", "Yes.<|end|>", "Yes.<|end|>\n", "Yes.<|end|> <|end|>"])
@pytest.mark.parametrize("behind", ["", "\n"])
def test_a_turn_ends_once(content, behind):
    template = CHAT_TEMPLATE.replace("<|end|>", "<|end|>" + behind)
    assert replies(template, {"content": content})[1] == ["Yes.<|end|>"]


def test_a_turn_s_end_that_is_not_eos_stays_and_gets_no_eos():
    tokenizer = chat(CHAT_TEMPLATE.replace("<|end|>", "<|system|>\n"))
    [(ids, n)] = tokenize_group("Q?", ["Yes."], tokenizer, **WHOLE, as_chat=True)
    assert tokenizer.decode(ids[n:]) == "Yes.<|system|>"


def test_the_end_of_the_conversation_is_no_part_of_a_reply():
    phi3 = CHAT_TEMPLATE.replace("<|end|>", "<|system|>\n").replace("{% endif %}", "{% else %}<|end|>{% endif %}")
    assert replies(phi3, PLAIN)[1] == ["Yes.<|system|>"]


def test_a_reply_that_nothing_ends_is_said(caplog):
    assert replies(CHAT_TEMPLATE.replace("<|end|>", ""), PLAIN)[1] == ["Yes."]
    assert "1 of 1 responses end in no special token ('Yes.')" in caplog.text


# ---------------------------------------------------------------------------------------- what templates refuse or lose


def test_chat_without_a_template():
    with pytest.raises(DataError, match="messages need a chat template and the tokenizer has none"):
        tokenize_group("a", ["b"], chat(None), **WHOLE, as_chat=True)


def test_template_whose_replies_do_not_follow_its_generation_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>think")
    )
    with pytest.raises(DataError, match=r"renders the prompt alone as '.*<\|assistant\|>think' but not so before"):
        tokenize_group(
            [{"role": "user", "content": "a"}], [[{"role": "assistant", "content": "b"}]], tokenizer, **WHOLE
        )


def test_messages_that_the_template_refuses(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must\\nalternate') }}")
    with pytest.raises(DataError, match=r"the chat template refuses the messages \(roles must alternate\); mend"):
        tokenize_group(
            [{"role": "user", "content": "a"}], [[{"role": "assistant", "content": "b"}]], tokenizer, **WHOLE
        )


@pytest.mark.parametrize(
    "written", ["{{ message['content'][0]['text'] }}", "{% if message['content'] is not string %}x{% endif %}"]
)
def test_a_template_that_leaves_out_the_reply_is_refused(written):
    with pytest.raises(DataError, match=r"leaves out the reply's text 'Yes\.'; use one"):
        replies(CHAT_TEMPLATE.replace("{{ message['content'] }}", written), PLAIN)


def test_messages_that_a_template_leaves_out_are_said(caplog):
    lossy = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    replies(lossy, PLAIN, prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}])
    assert "1 messages of prompts are left out by the chat template (first: system: 'Be brief.')" in caplog.text


def test_several_templates():
    assert replies({"default": CHAT_TEMPLATE, "tool_use": "x"}, PLAIN)[1] == ["Yes.<|end|>"]
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\) and none of them is called default"):
        replies({"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}, PLAIN)


def test_a_template_that_marks_generations():
    marked = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}"
    )
    assert replies(marked, PLAIN)[1] == ["Yes.<|end|>"]


def test_a_template_that_writes_the_date_is_said(caplog):
    replies("<|system|>{{ strftime_now('%d %b %Y') }}<|end|>" + CHAT_TEMPLATE, PLAIN, PLAIN)
    assert caplog.text.count("the chat template writes today's date") == 1


def test_special_tokens_within_messages_and_turns_of_others_are_said(caplog):
    tokenizer = chat(CHAT_TEMPLATE)
    turns = [{"role": role, "content": "a"} for role in ("assistant", "user", "assistant")]
    tokenize_group([{"role": "user", "content": "a<|end|>b"}], [turns, turns[:1]], tokenizer, **WHOLE)
    assert "1 texts hold special tokens inside (first: '<|end|>')" in caplog.text
    assert "1 of 2 responses hold turns of others than the assistant (first: user)" in caplog.text


def test_a_tokenizer_that_splits_special_tokens_still_reads_the_template_s():
    tokenizer = chat(CHAT_TEMPLATE)
    tokenizer.split_special_tokens = True
    [(ids, _)] = tokenize_group("Q?", ["Yes."], tokenizer, **WHOLE, as_chat=True)
    assert ids[-1] == tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------- published templates


SPEC = find_spec("trl")
PUBLISHED = sorted((Path(SPEC.origin).parent / "chat_templates").glob("*.jinja")) if SPEC else []
VISION = {"idefics3", "llava_next", "smolvlm"}  # they write contents that are lists of parts


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_templates_keep_every_word_once(file):
    template = re.sub(r"<\|im_end\|>|<\|eot_id\|>|<\|return\|>|<end_of_turn>|<turn\|>", "<|end|>", file.read_text())
    template = "{% set bos_token = '' %}" + template
    if file.stem in VISION or file.stem.removesuffix("_training") in VISION:
        with pytest.raises(DataError, match=r"leaves out the reply's text|refuses the messages"):
            replies(template, PLAIN)
        return
    _, found = replies(template, PLAIN, OWN, KEY)
    for reply in found:
        assert reply.count("Yes.") == 1
        assert reply.count("Hm") <= 1
        assert reply.count("</think>") <= 1
