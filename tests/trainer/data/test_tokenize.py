"""Tokens of prompts and responses: templates, special tokens, truncation."""

from dataclasses import replace
from functools import cache

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

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
    sequences = tokenize_group("abcdef", ["uvwxyz", "u"], tokenizer, max_prompt_length=4, max_length=8)
    assert decoded(tokenizer, sequences) == [("cdef", "uvwx"), ("cdef", "u<|end|>")]
    said = "cut to fit max_length=8, max_prompt_length=4: 1 of 1 prompts lost their beginning, 1 of 2 responses"
    assert caplog.text.count(said) == 1


def test_nothing_is_reported_where_nothing_was_cut(tokenizer, caplog):
    [(ids, n)] = tokenize_group("abc ", ["uvw"], tokenizer, max_prompt_length=4, max_length=8)
    assert (len(ids), n) == (8, 4)
    assert caplog.text == ""


@pytest.mark.parametrize("most", [None, 6, 99])
def test_max_length_alone_leaves_the_longest_response_room_and_the_prompt_half(tokenizer, most):
    lengths = {"max_prompt_length": most, "max_length": 6}
    assert decoded(tokenizer, tokenize_group("abcdef", ["u", "v"], tokenizer, **lengths))[0] == ("cdef", "u<|end|>")
    assert decoded(tokenizer, tokenize_group("abcdef", ["uvwxyz"], tokenizer, **lengths)) == [("def", "uvw")]
    assert decoded(tokenizer, tokenize_group("a", ["uvwxyz"], tokenizer, **lengths)) == [("a", "uvwxy")]


def test_lengths_must_be_positive(tokenizer):
    with pytest.raises(DataError, match="max_prompt_length=0: give at least 1"):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=0, max_length=6)
    with pytest.raises(DataError, match="max_length=1: give at least 2"):
        tokenize_group("abcdef", ["u"], tokenizer, max_prompt_length=None, max_length=1)


def merging_tokenizer():
    """Begins with <s> and merges "ab", so that a prompt's end and a response's beginning may grow together."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4, "<s>": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b")]))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_tokens_never_merge_across_the_boundary():
    sequences = tokenize_group("ca", ["bc", "cab"], merging_tokenizer(), **WHOLE)
    assert sequences == [([5, 2, 0, 1, 2, 4], 3), ([5, 2, 0, 2, 3, 4], 3)]


def tokenized(*rows, **options):
    rows = [
        {"prompt": prompt, "responses": list(responses), "win_rate": {"x": [0.5] * len(responses)}}
        for prompt, *responses in rows
    ]
    return tokens.tokenize_groups(to_groups(rows), ["x"], merging_tokenizer(), **WHOLE | options)


def test_groups_know_where_their_responses_begin_among_all():
    groups = tokenized(("a", "b", "c", "bc"), ("c", "a", "b"), ("b", "a", "c"))
    assert groups.dataset["first_response"][:] == [0, 3, 5]
    assert groups.sequences()[3:5] == [([5, 2, 0, 4], 2), ([5, 2, 1, 4], 2)]
    assert groups.group.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_groups_know_their_longest_widest_and_shortest():
    groups = tokenized(
        ("c" * 40, "c", "a"), ("c", "c" * 30, "c" * 9), ("c" * 20, "c" * 9, "c" * 8, "c" * 7)
    )  # rows of 45, 43 and 48 tokens
    assert [len(ids) for ids, _ in groups.longest_group()] == [43, 43]
    assert [len(ids) for ids, _ in groups.widest_group()] == [29, 30, 31]
    assert len(groups.shortest()[0]) == 12


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


# --------------------------------------------------------------------------------------------- kinds of tokenizers


ALPHABET = "abc .,\n"
WORDS = ["is", "yes", "un", "able", "ab", "bc", "egg", "?", "é", "日"]


def around(backend, before="", behind=""):
    """A backend that writes special tokens around a text."""
    backend.add_special_tokens(["<s>", "</s>", "[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {behind}".strip(),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before.split(), *behind.split()}],
    )
    return backend


def byte_level(add_prefix_space=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "y"), ("e", "s"), ("Ġy", "es"), ("i", "s"), ("a", "b"), ("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "Ġ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def llama(scheme):
    """SentencePiece's BPE with bytes, as Llama 2 has it; `legacy` writes ▁ behind every special token too."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abceisyung.,?"]
    merges = [("▁", "y"), ("e", "s"), ("▁y", "es"), ("y", "es"), ("i", "s"), ("▁", "is"), ("a", "b"), ("▁", "▁")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def fast(backend, **names):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>"} | names)


BERT = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
LOSSLESS = {
    "bytes": lambda: fast(around(byte_level())),
    "bytes, EOS written": lambda: fast(around(byte_level(), "<s>", "</s>")),
    "bytes, [CLS] and [SEP]": lambda: fast(
        around(byte_level(), "[CLS]", "[SEP]"), bos_token="[CLS]", eos_token="[SEP]"
    ),
    "bytes, BOS twice": lambda: fast(around(byte_level(), "<s> <s>", "</s>")),
    "Llama, legacy": lambda: fast(around(llama("legacy"), "<s>")),
    "Llama, always": lambda: fast(around(llama("always"), "<s>", "</s>")),
    "Llama, first": lambda: fast(around(llama("first"), "<s>")),
    "Llama, never": lambda: fast(around(llama("never"), "", "</s>")),
    "ByT5, in Python": ByT5Tokenizer,
}


@cache
def lossless(name):
    return LOSSLESS[name]()


texts = st.text(alphabet=ALPHABET) | st.lists(st.sampled_from([*WORDS, " ", "\n"])).map("".join)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=25, deadline=None)
@given(prompt=texts.filter(bool), responses=st.lists(texts.filter(bool), min_size=2, max_size=3))
@example("is ", ["yes", "no"])
@example("un", ["able", " able"])
@example("is\n", ["\nyes", " yes"])
@example("a", ["b", "EOS", "bEOS\n"])
@example("BOSis ", ["yesEOS", "yes EOSEOS\n"])
def test_tokens_decode_to_the_prompt_and_its_response(name, prompt, responses):
    tokenizer = lossless(name)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    written = [response.replace("EOS", eos) for response in responses]
    sequences = tokenize_group(prompt.replace("BOS", bos), written, tokenizer, **WHOLE)
    assert len({tuple(ids[:n]) for ids, n in sequences}) == 1
    for (ids, _), response in zip(sequences, responses, strict=True):
        text = (prompt + response).replace("BOS", "").replace("EOS\n", "").replace("EOS", "")
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert decoded.lstrip(" ") == text.lstrip(" ")  # SentencePiece's decoders eat a text's first space
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        if tokenizer.bos_token_id in tokenizer("a")["input_ids"]:
            assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_a_response_in_pieces_of_words_reads_on():
    vocab = {token: i for i, token in enumerate(["[UNK]", "un", "##able", "able", "unable", "is", ".", "x", "a"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = fast(around(backend, "[CLS]", "[SEP]"), bos_token=None, eos_token=None, unk_token="[UNK]")
    [(glued, _), (apart, n)] = tokenize_group("un", ["able", " is"], tokenizer, **WHOLE)
    assert tokenizer.convert_ids_to_tokens(glued) == ["[CLS]", "un", "##able", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(apart) == ["[CLS]", "un", "is", "[SEP]"]
    assert n == 2


def test_a_response_that_reads_wrong_behind_its_prompt_is_said(caplog):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "un": 1, "able": 2, "unable": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenize_group("un", ["able", " able"], fast(backend, unk_token="[UNK]"), **WHOLE)
    assert "1 of 2 responses begin with tokens that do not read as their text behind the prompt" in caplog.text


def test_special_tokens_that_cannot_be_left_out_are_refused(tokenizer, monkeypatch):
    class Stubborn(ByT5Tokenizer):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs | {"add_special_tokens": True})

    with pytest.raises(DataError, match=r"reads 'a' as \[100, 1\] and with add_special_tokens=False as \[100, 1\]"):
        tokenize_group("a", ["b"], Stubborn(), **WHOLE)


def test_special_tokens_are_found_in_a_vocabulary_without_latin_letters():
    backend = around(Tokenizer(models.BPE({"0": 0, "1": 1}, [])), "<s>", "</s>")
    tokenizer = fast(backend)
    assert tokenizer.convert_ids_to_tokens(tokenize_group("01", ["1"], tokenizer, **WHOLE)[0][0]) == [
        *("<s>", "0", "1", "1", "</s>")
    ]


def test_a_cut_prompt_keeps_what_the_tokenizer_writes_before_it(caplog):
    tokenizer = fast(around(byte_level(), "<s>", "</s>"))
    for prompt in ("cccccab", "<s>cccccab"):
        [(ids, n)] = tokenize_group(prompt, ["c"], tokenizer, max_prompt_length=3, max_length=None)
        assert tokenizer.decode(ids[:n]) == "<s>cab"
    assert caplog.text.count("cut to fit max_prompt_length=3: 1 of 1 prompts lost their beginning; raise") == 2


def test_a_cut_chat_keeps_its_bos(caplog):
    chatty = merging_tokenizer()
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenize_group("cbc", ["c"], chatty, max_prompt_length=2, max_length=None, as_chat=True) == [([5, 2, 2], 2)]


def test_cuts_are_counted_once_over_a_data_set(caplog):
    for _ in range(2):
        tokenized(("cccc", "c", "a"), ("cc", "cccc", "c"), max_prompt_length=3, max_length=6)
    said = "cut to fit max_length=6, max_prompt_length=3: 1 of 2 prompts lost their beginning, 1 of 4 responses lost"
    assert caplog.text.count(said) == 2


def test_an_error_names_its_group():
    with pytest.raises(DataError, match="group 0: messages need a chat template"):
        tokenized(("c", "c", "a"), as_chat=True)


# ----------------------------------------------------------------------------------------------- remarks on plain text


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        ("How do I boil an egg?", "Boil it.", True),
        ("How do I boil an egg? ", "Boil it.", False),
        ("How do I boil an egg?", "\nBoil it.", False),
        ("<|user|>How?<|end|><|assistant|>", "Boil it.<|end|>", False),
    ],
)
def test_plain_rows_that_are_glued_for_a_chat_model_are_said(tokenizer, caplog, prompt, response, said):
    tokenize_group(prompt, [response, response], tokenizer, **WHOLE)
    assert ("1 of 1 plain prompts run into their responses" in caplog.text) == said
    assert ("as_chat" in caplog.text) == said


def test_rendered_rows_keep_their_turns_end():
    backend = byte_level()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer = fast(backend, bos_token=None, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    sequences = tokenize_group(prompt, ["b<|im_end|>\n", "b<|endoftext|>\n", "b"], tokenizer, **WHOLE)
    assert [text for _, text in decoded(tokenizer, sequences)] == ["b<|im_end|>", "b<|endoftext|>", "b<|endoftext|>"]


def test_a_response_without_an_end_is_said(caplog):
    tokenizer = fast(byte_level(), eos_token=None)
    assert decoded(tokenizer, tokenize_group("a", ["b"], tokenizer, **WHOLE)) == [("a", "b")]
    assert "1 of 1 responses end in no special token ('b')" in caplog.text


def test_special_tokens_inside_a_response_are_said(tokenizer, caplog):
    tokenize_group("a ", ["b<|end|>c", "b<|end|>"], tokenizer, **WHOLE)
    assert "1 texts hold special tokens inside (first: '<|end|>')" in caplog.text
