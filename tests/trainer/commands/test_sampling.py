"""The sampling loop against `generate`, its seeds, its files."""

import json

import pytest
import torch

from mopo_trainer.commands import sampling
from mopo_trainer.commands.sampling import Sampling, full_sentences, sample_responses

PROMPTS = ["Say yes.", "A somewhat longer question, is it not?", "?"]


def greedy(model, tokenizer, prompt, max_new_tokens):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(chat, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def ending_model(tiny_model, tokenizer):
    """Random weights, scaled up for sharp predictions, that end some answers early."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(8.0)
    return tiny_model


def test_most_likely_tokens_are_those_of_generate(ending_model, tokenizer, monkeypatch):
    """Left padding, the shared prompt cache and dropping ended sequences change no token."""
    seen = []
    decode = type(tokenizer).batch_decode
    monkeypatch.setattr(
        type(tokenizer), "batch_decode", lambda self, ids, **kwargs: seen.extend(ids) or decode(self, ids, **kwargs)
    )
    sample_responses(ending_model, tokenizer, PROMPTS, Sampling(num_samples=2, top_k=1, max_new_tokens=12))
    expected = [greedy(ending_model, tokenizer, prompt, 12) for prompt in PROMPTS for _ in range(2)]
    assert seen == expected


def test_sequences_that_end_leave_the_batch(tiny_model, tokenizer):
    """The most likely token is the end token on odd steps of the first sequence only; the others go on."""
    rows = []
    eos = tokenizer.eos_token_id
    forward = tiny_model.forward

    def scripted(input_ids, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        rows.append(len(input_ids))
        output.logits[:] = 0
        output.logits[..., 100] = 1
        if len(rows) == 3:
            output.logits[0, :, eos] = 2
        return output

    tiny_model.forward = scripted
    texts = sample_responses(tiny_model, tokenizer, PROMPTS, Sampling(num_samples=1, top_k=1, max_new_tokens=6))
    assert rows == [3, 3, 3, 2, 2, 2]
    letter = tokenizer.decode([100])
    assert texts == [[letter * 2], [letter * 6], [letter * 6]]


def test_a_seed_fixes_the_draws_and_leaves_the_global_state(tiny_model, tokenizer):
    before = torch.get_rng_state()
    first = sample_responses(tiny_model, tokenizer, PROMPTS, Sampling(max_new_tokens=6, seed=3))
    again = sample_responses(tiny_model, tokenizer, PROMPTS, Sampling(max_new_tokens=6, seed=3))
    other = sample_responses(tiny_model, tokenizer, PROMPTS, Sampling(max_new_tokens=6, seed=4))
    assert first == again != other
    assert [len(texts) for texts in first] == [4, 4, 4]
    assert torch.equal(before, torch.get_rng_state())


def test_training_mode_comes_back(tiny_model, tokenizer):
    tiny_model.train()
    sample_responses(tiny_model, tokenizer, PROMPTS[:1], Sampling(num_samples=1, max_new_tokens=2))
    assert tiny_model.training


def test_draws_follow_temperature_top_k_and_top_p():
    """200,000 draws from p = (.5, .3, .15, .05): within 5 standard errors of the restricted distribution."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 200_000
    logits = p.log().expand(n, 4)

    def shares(**settings):
        options = {"temperature": 1.0, "top_k": 4, "top_p": 1.0, **settings}
        drawn = sampling._draw(logits, generator=torch.Generator().manual_seed(0), **options)
        return drawn.bincount(minlength=4) / n

    for settings, expected in (
        ({}, p),
        ({"top_k": 2}, torch.tensor([0.5, 0.3, 0, 0]) / 0.8),
        ({"top_p": 0.81}, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95),  # the set reaches top_p with the third token
        ({"temperature": 0.5}, p.square() / p.square().sum()),
    ):
        torch.testing.assert_close(shares(**settings), expected, rtol=0, atol=5 * 0.5 / n**0.5)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One. Two! And thr", "One. Two!"),
        ('He said "no." And', 'He said "no."'),
        ("Version 2.5 is out", "Version 2.5 is out"),
        ("no end", "no end"),
        ("Done.", "Done."),
    ],
)
def test_full_sentences(text, kept):
    assert full_sentences(text) == kept


def test_command_writes_responses_and_settings(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("One?\n\nTwo?\n")
    output = tmp_path / "out.jsonl"
    sampling.main(
        [
            *("--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--output", str(output)),
            *("--num-samples", "3", "--max-new-tokens", "4", "--seed", "5"),
        ]
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["One?", "Two?"]
    assert [len(row["responses"]) for row in rows] == [3, 3]
    settings = json.loads(output.with_suffix(".settings.json").read_text())
    assert settings["seed"] == 5
    assert settings["max_new_tokens"] == 4
    assert set(settings["versions"]) == {"python", "torch", "transformers", "tokenizers"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model",
        "out.jsonl",
        "out.settings.json",
        "prompts.txt",
    ]


def test_shipped_data_are_complete():
    """What the demo trains on: every prompt of the list, four responses each, and the settings that made them."""
    prompts = (sampling.DEMO_DATA / "prompts.txt").read_text().splitlines()
    rows = [json.loads(line) for line in (sampling.DEMO_DATA / "responses.jsonl").read_text().splitlines()]
    settings = json.loads((sampling.DEMO_DATA / "responses.settings.json").read_text())
    assert [row["prompt"] for row in rows] == prompts
    assert {len(row["responses"]) for row in rows} == {settings["num_samples"]} == {4}
    assert all(text for row in rows for text in row["responses"])
