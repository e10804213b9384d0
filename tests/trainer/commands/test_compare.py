"""`mopo compare`: whose texts are drawn and how, what is compared, and what the line between two trials says."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mopo_trainer.commands import compare
from mopo_trainer.commands.compare import Drawing, Trial, advice, draw, end_tokens, load_prompts, prompt_tokens
from mopo_trainer.commands.main import main

HOW = Drawing(samples=3, max_new_tokens=6, batch_size=6)


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path):
    """A directory with a model."""
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tokenizer, tmp_path):
    """A directory with an adapter that moves the base's logits."""
    model, _ = compare.load(str(base), "float32")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"Question {i}?"} for i in (0, 1, 2, 1)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def drawn(path):
    return [json.loads(line) for line in (path / "texts.jsonl").read_text().splitlines()]


OPTIONS = ("--scorer", "brevity", "--samples", 3, "--max-new-tokens", 6)


def test_an_adapter_stands_against_the_model_without_it(capsys, adapter, base, prompts, tmp_path):
    code, out, _ = run(capsys, adapter, prompts, *OPTIONS, "--threshold", "brevity=0.6", "--output", tmp_path / "a")
    assert code == 0
    assert "brevity" in out
    run(capsys, adapter, prompts, "--base", base, *OPTIONS, "--output", tmp_path / "b")
    own, given = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert own == given
    assert [row["prompt"] for row in own] == ["Question 0?", "Question 1?", "Question 2?"]
    assert all(len(row["model"]) == len(row["base"]) == 3 for row in own)
    assert all(row["model"] != row["base"] for row in own)


def test_the_file_holds_the_win_rates_of_the_texts(capsys, adapter, prompts, tmp_path):
    run(
        capsys, adapter, prompts, *OPTIONS, "--threshold", "brevity=0.6", "--asked", "brevity=0.7", "--output", tmp_path
    )
    found = json.loads((tmp_path / "compare.json").read_text())
    row = found["objectives"]["brevity"]
    lengths = [[[len(text.split()) for text in r[side]] for side in ("model", "base")] for r in drawn(tmp_path)]
    wins = [(a < b) + (a == b) / 2 for ours, theirs in lengths for a in ours for b in theirs]
    assert row["mean"] == pytest.approx(sum(wins) / len(wins))
    assert (row["threshold"], row["asked"]) == (0.6, 0.7)
    assert found["words"]["model"] == pytest.approx(sum(sum(ours) for ours, _ in lengths) / 9)


def test_the_same_model_draws_other_texts_on_its_two_sides(capsys, base, prompts, tmp_path):
    """Texts that are compared must not share their draws: the win rate of a coupled pair is another one."""
    run(capsys, base, prompts, "--base", base, *OPTIONS, "--output", tmp_path)
    for row in drawn(tmp_path):
        assert not set(row["model"]) & set(row["base"])


@pytest.fixture
def sharp(base):
    """The model with an opinion on every token."""
    model, _ = compare.load(str(base), "float32")
    with torch.no_grad():
        model.lm_head.weight *= 30
        for layer in model.model.layers:
            for weight in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight):
                weight *= 30  # what attention brings counts
    return model


def test_texts_follow_the_temperature_and_not_the_model_s_own_settings(sharp, tokenizer):
    ids = prompt_tokens(["a", "a longer prompt"], tokenizer, as_chat=False)
    plain = draw(sharp, tokenizer, ids, HOW, "")
    sharp.generation_config = GenerationConfig(
        do_sample=False, top_k=1, repetition_penalty=5.0, min_new_tokens=6, eos_token_id=tokenizer.eos_token_id
    )
    assert draw(sharp, tokenizer, ids, HOW, "") == plain
    assert draw(sharp, tokenizer, ids, Drawing(3, 6, temperature=1e-4), "").texts != plain.texts


def test_a_batch_of_prompts_is_answered_as_each_alone(sharp, tokenizer):
    ids = prompt_tokens(["a", "bc", "a longer prompt", "def"], tokenizer, as_chat=False)
    coldest = Drawing(samples=1, max_new_tokens=8, temperature=1e-4, batch_size=4)
    together, alone = (draw(sharp, tokenizer, ids, replace(coldest, batch_size=size), "") for size in (4, 1))
    assert together == alone
    assert len({text for (text,) in together.texts}) >= 3


def test_draws_are_from_the_model_s_distribution(sharp, tokenizer):
    """The first token against the softmax."""
    ids = prompt_tokens(["b", "a much longer prompt"], tokenizer, as_chat=False)
    expected = sharp(input_ids=torch.tensor([ids[0]])).logits[0, -1].softmax(-1)
    seen = torch.zeros_like(expected)
    generated = []
    original = tokenizer.batch_decode
    tokenizer.batch_decode = lambda new, **options: generated.extend(new) or original(new, **options)
    draw(sharp, tokenizer, ids, Drawing(samples=2000, max_new_tokens=1, batch_size=4000), "")
    for (token,) in generated[:2000]:
        seen[token] += 1 / 2000
    assert (seen - expected).abs().max() < 0.04
    assert 0.1 < expected.max() < 0.9


def test_a_reply_ends_at_any_end_token_of_the_model(base, tokenizer):
    model, _ = compare.load(str(base), "float32")
    question = tokenizer.convert_tokens_to_ids("<|user|>")
    model.generation_config.eos_token_id = [question, tokenizer.eos_token_id]
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, question]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely
    long, short = (draw(model, tokenizer, [[5]], Drawing(500, most), "").cut for most in (300, 50))
    ends = 2 / len(tokenizer)
    assert long == pytest.approx((1 - ends) ** 300, abs=0.07)
    assert short == pytest.approx((1 - ends) ** 50, abs=0.07)


def test_prompts_are_read_from_whatever_training_reads(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Why?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": chat}) + "\n")
    assert load_prompts(str(tmp_path / "chat.jsonl"), "train", None) == [chat]
    said = [*chat, {"role": "assistant", "content": "So."}]
    other = [*chat, {"role": "assistant", "content": "Because."}]
    (tmp_path / "pair.jsonl").write_text(json.dumps({"chosen": said, "rejected": other}) + "\n")
    assert load_prompts(str(tmp_path / "pair.jsonl"), "train", None) == [chat]
    as_chat, plain = (prompt_tokens(["Why?"], tokenizer, as_chat=x)[0] for x in (True, False))
    assert prompt_tokens([chat], tokenizer, as_chat=False)[0] == as_chat
    assert tokenizer.decode(as_chat) == "<|user|>Why?<|end|><|assistant|>"
    assert tokenizer.decode(plain) == "Why?"


def test_what_to_ask_is_on_the_line_between_the_two_trials_nearest_to_the_aim():
    trials = [Trial(0.6, 0.41), Trial(0.9, 0.85), Trial(0.7, 0.53)]
    # from (0.7, 0.53) to (0.6, 0.41): 0.6 + 0.02 lies at 0.7 + 0.09 / 1.2
    assert "Ask the labels for 0.775" in advice(0.6, 0.02, trials)
    assert "missed by 0.070" in advice(0.6, 0.02, trials)
    assert "Train once more" in advice(0.6, 0.02, [Trial(0.7, 0.53)])
    assert "Train once more" in advice(0.6, 0.02, [Trial(0.7, 0.53), Trial(0.7, 0.55)])
    assert "nothing to ask again" in advice(0.6, 0.02, [Trial(0.7, 0.63)])
    assert "held by less than a standard error" in advice(0.6, 0.02, [Trial(0.6, 0.5), Trial(0.7, 0.61)])
    assert "does not rise" in advice(0.6, 0.02, [Trial(0.6, 0.55), Trial(0.7, 0.53)])
    assert "no threshold is enough" in advice(0.6, 0.02, [Trial(0.9, 0.50), Trial(0.95, 0.51)])


def test_an_earlier_trial_of_like_texts_gives_the_line(capsys, adapter, prompts, tmp_path):
    arguments = (adapter, prompts, *OPTIONS, "--threshold", "brevity=0.99")
    run(capsys, *arguments, "--asked", "brevity=0.6", "--output", tmp_path / "a")
    earlier = tmp_path / "a" / "compare.json"
    found = json.loads(earlier.read_text())
    found["objectives"]["brevity"]["mean"] = 0.1
    earlier.write_text(json.dumps(found))
    _, out, _ = run(capsys, *arguments, "--asked", "brevity=0.7", "--before", earlier, "--output", tmp_path / "b")
    assert "the line between 0.7" in " ".join(out.split())
    code, _, err = run(capsys, *arguments, "--before", earlier, "--seed", 3, "--output", tmp_path / "b")
    assert code == 2
    assert "drawing was" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no scorer"),
        (("--scorer", "brevity", "--threshold", "brief=0.6"), "no scorer computes brief"),
        (("--scorer", "brevity", "--asked", "brevity=0.6"), "asked names brevity, which has no threshold"),
        (("--scorer", "brevity"), "is no adapter: give --base"),
        (("--scorer", "brevity", "--top-p", "1.2"), "not a probability in (0, 1]"),
        (("--scorer", "brevity", "--temperature", "0"), "is not a positive number"),
        (("--scorer", "brevity", "--before", "pyproject.toml", "--threshold", "brevity=0.6"), "not a compare.json"),
        (("--scorer", "brevity", "--max-new-tokens", "600"), "beyond the model's 512"),
        (("--scorer", "brevity", "--base", "nowhere/at/all"), "no such directory, or no model in it"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(capsys, base, prompts, tmp_path, arguments, said):
    more = ("--base", base) if "600" in arguments else ()
    code, _, err = run(capsys, base, prompts, *arguments, *more, "--output", tmp_path / "out")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1 or "Base" in err or "model" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_named(capsys, base, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    code, _, err = run(capsys, base, tmp_path / "empty.jsonl", "--base", base, "--scorer", "brevity")
    assert (code, "prompt 1 is empty" in err) == (2, True)
