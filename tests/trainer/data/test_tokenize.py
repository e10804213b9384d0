"""Tokens of prompts and responses: templates, special tokens, truncation."""

from dataclasses import replace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from mopo_trainer.data import DataError, plain_text, to_groups, tokenize_group, tokens

WHOLE = {"max_prompt_length": None, "max_length": None}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def decoded(tokenizer, sequences):
    """(prompt text, response text) of every sequence."""
    return [(tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])) for ids, n in sequences]


def test_plain_text_joins_messages():
    assert plain_text("a") == "a"
    assert plain_text([user("a"), assistant("b")]) == "a\n\nb"


def test_tokenize_plain_text(tokenizer):
    sequences = tokenize_group("Why? ", ["So.", "Because.<|end|>"], tokenizer, **WHOLE)
    assert decoded(tokenizer, sequences) == [("Why? ", "So.<|end|>"), ("Why? ", "Because.<|end|>")]
    assert [n for _, n in sequences] == [5, 5]  # byte level: one token a character


@pytest.mark.parametrize("as_chat", [False, True])
def test_tokenize_chat(tokenizer, as_chat):
    prompt, responses = "Why?", ["So.", "Because."]
    if not as_chat:
        prompt, responses = [user(prompt)], [[assistant(response)] for response in responses]
    sequences = tokenize_group(prompt, responses, tokenizer, **WHOLE, as_chat=as_chat)
    start = "<|user|>Why?<|end|><|assistant|>"
    assert decoded(tokenizer, sequences) == [(start, "So.<|end|>"), (start, "Because.<|end|>")]
    whole = tokenizer.apply_chat_template([user("Why?"), assistant("Because.")], tokenize=True)["input_ids"]
    assert sequences[1][0] == whole


def test_what_a_chat_template_writes_behind_the_end_is_left_out(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template.replace("<|end|>", "<|end|>\n"))
    [(ids, n)] = tokenize_group([user("Why?")], [[assistant("So.")]], tokenizer, **WHOLE)
    assert tokenizer.decode(ids[n:]) == "So.<|end|>"
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:n]) == "<|user|>Why?<|end|>\n<|assistant|>"


def test_messages_from_a_table_lose_the_keys_that_others_have(tokenizer):
    prompt = [{"role": "user", "content": "Why?", "name": None}]
    template = "{% for m in messages %}{{ m['content'] }}{% if 'name' in m %}!{% endif %}{% endfor %}"
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    named.chat_template = template
    [(ids, _)] = tokenize_group(prompt, [[assistant("So.")]], named, **WHOLE)
    assert named.decode(ids) == "Why?So."


def test_truncation_takes_the_prompt_from_the_left_and_the_response_from_the_right(tokenizer, caplog):
    tokens._report_cut.cache_clear()
    sequences = tokenize_group("abcdef", ["uvwxyz", "u"], tokenizer, max_prompt_length=4, max_length=8)
    assert decoded(tokenizer, sequences) == [("cdef", "uvwx"), ("cdef", "u<|end|>")]
    tokenize_group("abcdef", ["uvwxyz", "u"], tokenizer, max_prompt_length=4, max_length=8)
    assert caplog.text.count("cut to fit max_length=8") == 1


def test_nothing_is_reported_where_nothing_was_cut(tokenizer, caplog):
    tokens._report_cut.cache_clear()
    [(ids, n)] = tokenize_group("abcdef", ["uvw"], tokenizer, max_prompt_length=4, max_length=8)
    assert (len(ids), n) == (8, 4)
    assert caplog.text == ""


def test_a_prompt_that_leaves_no_room_is_an_error(tokenizer):
    with pytest.raises(
        DataError, match=r"prompt's 6 tokens leave no room for a response in max_length=6; set max_prompt"
    ):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=None, max_length=6)


def test_lengths_must_be_positive(tokenizer):
    with pytest.raises(DataError, match="max_prompt_length=0: give at least 1"):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=0, max_length=6)


def merging_tokenizer():
    """Begins with <s> and merges "ab", so that a prompt's end and a response's beginning may grow together."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4, "<s>": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_tokens_never_merge_across_the_boundary():
    sequences = tokenize_group("ca", ["bc", "cab"], merging_tokenizer(), **WHOLE)
    assert sequences == [([5, 2, 0, 1, 2, 4], 3), ([5, 2, 0, 2, 3, 4], 3)]


def tokenized(*rows):
    rows = [
        {"prompt": prompt, "responses": list(responses), "win_rate": {"x": [0.5] * len(responses)}}
        for prompt, *responses in rows
    ]
    return tokens.tokenize_groups(to_groups(rows), ["x"], merging_tokenizer(), **WHOLE)


def test_groups_know_where_their_responses_begin_among_all():
    groups = tokenized(("a", "b", "c", "bc"), ("c", "a", "b"), ("b", "a", "c"))
    assert groups.dataset["first_response"][:] == [0, 3, 5]
    assert groups.sequences()[3:5] == [([5, 2, 0, 4], 2), ([5, 2, 1, 4], 2)]
    assert groups.group.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_the_fingerprint_sees_tokens_their_order_and_where_prompts_end():
    different = [
        tokenized(("c", "cc", "a")),
        tokenized(("cc", "c", "a")),
        tokenized(("c", "a", "cc")),
        tokenized(("c", "cc", "b")),
    ]
    assert different[0].fingerprint() == tokenized(("c", "cc", "a")).fingerprint()
    assert len({groups.fingerprint() for groups in different}) == len(different)
    cut = replace(different[0], dataset=Dataset.from_list([{"input_ids": [[5, 2, 2, 2, 4]], "prompt_tokens": [2]}]))
    moved = replace(cut, dataset=Dataset.from_list([{"input_ids": [[5, 2, 2, 2, 4]], "prompt_tokens": [3]}]))
    joined = replace(cut, dataset=Dataset.from_list([{"input_ids": [[5, 2], [2, 2, 4]], "prompt_tokens": [1, 1]}]))
    assert len({groups.fingerprint() for groups in (cut, moved, joined)}) == 3


def test_special_tokens_of_a_chat_come_from_its_template_only():
    chatty = merging_tokenizer()
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenize_group("c", ["c", "ab"], chatty, **WHOLE, as_chat=True) == [([5, 2, 2], 2), ([5, 2, 3], 2)]


def test_chat_without_a_template():
    with pytest.raises(DataError, match="messages need a chat template and the tokenizer has none"):
        tokenize_group("a", ["b"], merging_tokenizer(), **WHOLE, as_chat=True)


def test_template_whose_replies_do_not_follow_its_generation_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>think")
    )
    with pytest.raises(DataError, match=r"renders the prompt alone as '.*<\|assistant\|>think' but not so before"):
        tokenize_group([user("a")], [[assistant("b")]], tokenizer, **WHOLE)


def test_messages_that_the_template_refuses(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must\\nalternate') }}")
    with pytest.raises(DataError, match=r"the chat template refuses the messages \(roles must alternate\); mend"):
        tokenize_group([user("a")], [[assistant("b")]], tokenizer, **WHOLE)
