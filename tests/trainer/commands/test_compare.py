"""`mopo compare`: whose texts are drawn and how, what is compared, and what the line between two trials says."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig

from mopo_trainer.commands import compare
from mopo_trainer.commands.compare import Drawing, Questions, Trial, advice, end_tokens, load, read_prompts
from mopo_trainer.commands.main import main
from mopo_trainer.data import DataError

HOW = Drawing(samples=3, max_new_tokens=6)
COLD = Drawing(samples=1, max_new_tokens=8, temperature=1e-4)


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path):
    """A directory with a model that has an opinion on every token."""
    with torch.no_grad():
        tiny_model.lm_head.weight *= 30
        for layer in tiny_model.model.layers:
            for weight in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight):
                weight *= 30  # what attention brings counts
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tokenizer, tmp_path):
    """A directory with an adapter that moves the base's logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load(str(base), "float32"), config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", *({"prompt": f"Question {i}?"} for i in (0, 1, 2, 1)))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def drawn(path):
    return [json.loads(line) for line in (path / "texts.jsonl").read_text().splitlines()]


def draw(model, tokenizer, prompts, how, batch_size=32):
    return compare.draw(model, tokenizer, tokens(prompts, tokenizer), how, how.seed, batch_size, "")


def tokens(prompts, tokenizer, **options):
    return compare.prompt_tokens(prompts, tokenizer, Questions("questions", **options))[0]


OPTIONS = ("--scorer", "brevity", "--samples", 3, "--max-new-tokens", 6)


def test_an_adapter_stands_against_the_base_that_it_names(capsys, adapter, base, prompts, tmp_path):
    code, out, _ = run(capsys, adapter, prompts, *OPTIONS, "--threshold", "brevity=0.6", "--output", tmp_path / "a")
    assert code == 0
    assert f"{adapter} against {base}: 3 prompts × 3 texts" in out
    run(capsys, adapter, prompts, "--base", base, *OPTIONS, "--output", tmp_path / "b")
    rows = drawn(tmp_path / "a")
    assert rows == drawn(tmp_path / "b")
    assert "<|" not in str(rows)
    assert json.loads((tmp_path / "a" / "compare.json").read_text())["base"] == str(base)
    assert [row["prompt"] for row in rows] == ["Question 0?", "Question 1?", "Question 2?"]
    assert all(len(row["model"]) == len(row["base"]) == 3 for row in rows)
    run(capsys, base, prompts, "--base", base, *OPTIONS, "--output", tmp_path / "c")
    assert [row["base"] for row in drawn(tmp_path / "c")] == [row["base"] for row in rows]
    assert [row["model"] for row in drawn(tmp_path / "c")] != [row["model"] for row in rows]


def test_the_file_holds_the_win_rates_of_the_texts(capsys, adapter, prompts, tmp_path):
    asked = ("--threshold", "brevity=0.6", "--asked", "brevity=0.7")
    _, out, _ = run(capsys, adapter, prompts, *OPTIONS, *asked, "--output", tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    row = found["objectives"]["brevity"]
    lengths = [[[len(text.split()) for text in r[side]] for side in ("model", "base")] for r in drawn(tmp_path)]
    rates = [[(a < b) + (a == b) / 2 for a in ours for b in theirs] for ours, theirs in lengths]
    by_prompt = torch.tensor(rates).mean(1)
    assert row["mean"] == pytest.approx(by_prompt.mean().item())
    assert row["standard_error"] == pytest.approx(by_prompt.std().item() / math.sqrt(3))
    assert by_prompt.min() <= row["low"] <= row["mean"] <= row["high"] <= by_prompt.max()
    assert (row["threshold"], row["asked"]) == (0.6, 0.7)
    assert row["verdict"] == (
        "met" if row["mean"] >= 0.6 else "missed" if row["high"] < 0.6 else "missed within the interval"
    )
    for side, place in (("model", 0), ("base", 1)):
        words = [n for both in lengths for n in both[place]]
        assert found["texts"][side]["words"] == pytest.approx(sum(words) / 9)
    assert found["texts"]["model"]["cut"] > 0
    assert "reached max_new_tokens=6" in out
    assert "3 prompts are few" in out


def test_an_adapter_stands_on_its_own_base_whatever_it_is_compared_with(adapter, base, tokenizer, tmp_path):
    """One that goes on from another adapter is not put on top of that."""
    other = load(str(base), "float32")
    get_peft_model(other, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "more"
    )
    ids = torch.tensor(tokens(["a", "b"], tokenizer))
    alone = PeftModel.from_pretrained(load(str(base), "float32"), tmp_path / "more")(ids).logits
    assert torch.equal(load(str(tmp_path / "more"), "float32")(ids).logits, alone)
    assert not torch.equal(load(str(adapter), "float32")(ids).logits, alone)


def test_the_same_model_draws_other_texts_on_its_two_sides(capsys, base, prompts, tmp_path):
    """Texts that are compared must not share their draws: the win rate of a coupled pair is another one."""
    run(capsys, base, prompts, "--base", base, *OPTIONS, "--temperature", 9, "--output", tmp_path)
    for row in drawn(tmp_path):
        assert not set(row["model"]) & set(row["base"])


def test_options_reach_the_drawing(capsys, base, prompts, tmp_path):
    def texts(*more):
        assert run(capsys, base, prompts, "--base", base, *OPTIONS, *more, "--output", tmp_path)[0] == 0
        return drawn(tmp_path)

    plain = texts()
    for more in (("--as-chat",), ("--top-p", 0.05), ("--top-k", 1), ("--temperature", 5), ("--seed", 1)):
        found = texts(*more)
        assert [row["model"] for row in found] != [row["model"] for row in plain], more
        assert [row["base"] for row in found] != [row["base"] for row in plain], more
    assert texts("--max-prompts", 2) != plain
    assert len(drawn(tmp_path)) == 2
    assert texts("--dtype", "bfloat16") != plain
    assert texts("--max-prompt-length", 3) != plain


def test_the_model_s_own_settings_do_not_count(base, tokenizer):
    model, asked = load(str(base), "float32"), ["a", "a longer prompt"]
    plain = draw(model, tokenizer, asked, HOW)
    model.generation_config = GenerationConfig(
        do_sample=False, top_k=1, repetition_penalty=5.0, min_new_tokens=6, eos_token_id=tokenizer.eos_token_id
    )
    assert draw(model, tokenizer, asked, HOW) == plain


def test_a_batch_of_prompts_is_answered_as_each_alone(base, tokenizer):
    model, asked = load(str(base), "float32"), ["a", "bc", "a longer prompt", "def"]
    together, alone = (draw(model, tokenizer, asked, COLD, batch_size=size) for size in (4, 1))
    assert together == alone
    assert len({text for (text,) in together.texts}) >= 3


def test_draws_are_from_the_model_s_distribution(base, tokenizer, monkeypatch):
    """The first token against the softmax."""
    model = load(str(base), "float32")
    (ids,) = compare.prompt_tokens(["b", "c"], tokenizer, Questions("", max_prompts=None))[0][:1]
    expected = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    generated = []
    decode = tokenizer.batch_decode
    monkeypatch.setattr(tokenizer, "batch_decode", lambda new, **more: generated.extend(new) or decode(new, **more))
    draw(model, tokenizer, ["b", "c"], Drawing(samples=2000, max_new_tokens=1))
    seen = torch.tensor([token for (token,) in generated[:2000]]).bincount(minlength=len(expected)) / 2000
    assert (seen - expected).abs().max() < 0.04
    assert 0.1 < expected.max() < 0.9
    assert (seen > 0).sum() > 50  # nothing is cut off


@pytest.mark.parametrize("kind", ["LoRA", "prompt tuning"])
def test_an_adapter_s_texts_are_those_of_its_forward(base, tokenizer, kind, tmp_path):
    """At temperature 0 against an arg-max step by step: peft's `generate` knows other settings."""
    torch.manual_seed(1)
    config = {
        "LoRA": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    get_peft_model(load(str(base), "float32"), config).save_pretrained(tmp_path / "kind")
    model = load(str(tmp_path / "kind"), "float32")
    asked = ["a", "a longer prompt"]
    expected = []
    for ids in tokens(asked, tokenizer):
        new = []
        while len(new) < 8 and (not new or new[-1] != tokenizer.eos_token_id):
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        expected.append([tokenizer.decode(new, skip_special_tokens=True).strip()] * 2)
    assert draw(model, tokenizer, asked, replace(COLD, samples=2)).texts == expected


def test_a_reply_ends_at_any_end_token(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(str(base), "float32")
    user, assistant = (tokenizer.convert_tokens_to_ids(x) for x in ("<|user|>", "<|assistant|>"))
    model.generation_config.eos_token_id = [user, tokenizer.eos_token_id]
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id, user]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] }}<|end|>", "message['content'] }}<|assistant|>"
    )
    assert assistant in end_tokens(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely
    cut = draw(model, tokenizer, ["a", "b"], Drawing(400, 100)).cut
    assert cut == pytest.approx((1 - 3 / len(tokenizer)) ** 100, abs=0.06)


def test_prompts_are_those_that_training_sees(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Why?"}]

    def read(*rows):
        return read_prompts(Questions(str(write(tmp_path / "rows.jsonl", *rows))))

    so, because = ([{"role": "assistant", "content": text}] for text in ("So.", "Because."))
    assert read({"prompt": "Why?"}) == ["Why?"]
    assert read({"prompt": chat}) == [chat]
    assert read({"prompt": "Why?", "responses": ["So.", "Because."]}) == ["Why?"]  # labelled by scorers alone
    assert read({"prompt": "Why?", "responses": ["a", "b"], "ratings": {"x": [1, 2]}}) == ["Why?"]
    assert read({"chosen": chat + so, "rejected": chat + because}) == [chat]
    assert read({"prompt": "Why?", "chosen": so, "rejected": because}) == [chat]
    with pytest.raises(DataError, match=r"rows\.jsonl: .*row 1"):
        read({"prompt": "a"}, {"prompt": chat})
    with pytest.raises(DataError, match=r"rows\.jsonl: .*row 1"):
        read({"prompt": "a"}, {"prompt": None})
    as_chat, plain = (tokens(["Why?", "No?"], tokenizer, as_chat=x)[0] for x in (True, False))
    assert tokens([chat, "Why?", "No?"], tokenizer)[:2] == [as_chat, plain]
    assert tokens([chat, "Why?", "No?"], tokenizer, as_chat=True) == tokens(["Why?", "No?"], tokenizer, as_chat=True)
    assert tokenizer.decode(as_chat) == "<|user|>Why?<|end|><|assistant|>"
    assert tokenizer.decode(plain) == "Why?"
    assert tokens(["Why?", "No?"], tokenizer, max_prompt_length=2)[0] == plain[-2:]


def test_what_to_ask_is_on_the_line_between_two_trials():
    trials = [Trial(0.6, 0.41), Trial(0.9, 0.85), Trial(0.7, 0.53)]
    # 0.62 lies between 0.53 and 0.85: 0.7 + 0.2 · 0.09 / 0.32
    assert "missed by 0.070. Ask the labels for 0.756" in advice(0.6, 0.02, trials)
    # beyond 0.41 and 0.53: 0.7 + 0.1 · 0.09 / 0.12
    assert advice(0.6, 0.02, [trials[0], trials[2]]).endswith("0.775, by the line between 0.6 (written 0.410) and "
        "0.7 (0.530), beyond both.")  # fmt: skip
    assert "Train once more, asking the labels for more than 0.7" in advice(0.6, 0.02, [Trial(0.7, 0.53)])
    assert "Train once more" in advice(0.6, 0.02, [Trial(0.7, 0.53), Trial(0.7, 0.55)])
    assert "more than 1 cannot be asked" in advice(0.6, 0.02, [Trial(1.0, 0.53)])
    held = "held by more than a standard error (0.020)"
    assert advice(0.6, 0.02, [Trial(0.7, 0.63)]) == f"{held}; nothing to ask again."
    assert advice(0.6, 0.02, [Trial(0.6, 0.62), Trial(0.7, 0.65)]) == f"{held}; nothing to ask again."
    assert advice(0.6, 0.02, [Trial(0.6, 0.7), Trial(0.7, 0.65)]) == f"{held}; nothing to ask again."
    assert "0.720 would have been enough" in advice(0.6, 0.02, [Trial(0.6, 0.5), Trial(0.8, 0.7)])
    assert "held by no more than a standard error" in advice(0.6, 0.02, [Trial(0.6, 0.5), Trial(0.7, 0.61)])
    assert "held by no more" in advice(0.5, 0.0, [Trial(0.6, 0.5)])  # all texts tie
    assert "as chance may" in advice(0.6, 0.02, [Trial(0.6, 0.50), Trial(0.65, 0.55)])
    assert "against what was asked" in advice(0.6, 0.01, [Trial(0.6, 0.55), Trial(0.7, 0.5)])
    assert "no threshold is enough" in advice(0.6, 0.001, [Trial(0.9, 0.50), Trial(0.95, 0.51)])
    assert "no threshold is enough" in advice(1.0, 0.02, [Trial(0.9, 0.8), Trial(0.95, 0.9)])
    assert "nothing to ask again" in advice(1.0, 0.02, [Trial(0.9, 1.0)])


def test_an_earlier_trial_of_like_texts_gives_the_line(capsys, adapter, base, prompts, tmp_path):
    arguments = (adapter, prompts, *OPTIONS, "--threshold", "brevity=0.99")
    run(capsys, *arguments, "--asked", "brevity=0.3", "--output", tmp_path / "a")
    earlier = tmp_path / "a" / "compare.json"
    found = json.loads(earlier.read_text())
    row = found["objectives"]["brevity"]
    row["mean"] = 0.0
    earlier.write_text(json.dumps(found))
    code, out, _ = run(
        capsys, *arguments, "--asked", "brevity=0.4", "--before", earlier, "--batch-size", 3, "--output", tmp_path / "b"
    )
    now = json.loads((tmp_path / "b" / "compare.json").read_text())["objectives"]["brevity"]
    trials = [Trial(0.3, 0.0), Trial(0.4, now["mean"])]
    assert (code, now["advice"]) == (0, advice(0.99, now["standard_error"], trials))
    assert now["advice"] in out
    again = shutil.copytree(base, tmp_path / "again")
    others = {
        "drawing": ("--dtype", "bfloat16"),
        "base": ("--base", again),
        "prompts": ("--as-chat",),
        "scorers": ("--scorer", "friendliness"),
    }
    for said, more in others.items():
        code, _, err = run(capsys, *arguments, *more, "--before", earlier, "--output", tmp_path / "c")
        assert (code, f"not the same {said}" in err) == (2, True)
    code, _, err = run(capsys, *arguments, "--before", earlier, "--output", tmp_path / "a")
    assert (code, "would be overwritten" in err) == (2, True)
    for changed, said in (({"mean": 7.0}, "outside [0, 1]"), ({"asked": None}, "not a compare.json")):
        write(tmp_path / "bad.json", found | {"objectives": {"brevity": row | changed}})
        code, _, err = run(capsys, *arguments, "--before", tmp_path / "bad.json", "--output", tmp_path / "c")
        assert (code, said in err) == (2, True)
    write(tmp_path / "bad.json", found | {"objectives": {"other": row}})
    code, _, err = run(capsys, *arguments, "--before", tmp_path / "bad.json", "--output", tmp_path / "c")
    assert (code, "no threshold on brevity" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no scorer"),
        (("--scorer", "brevity", "--threshold", "brief=0.6"), "no scorer computes brief"),
        (("--scorer", "brevity", "--asked", "brevity=0.6"), "--asked names brevity, which has no threshold"),
        (("--scorer", "brevity", "--asked", "brevity=2"), "--asked: threshold brevity=2 is not a win rate"),
        (("--scorer", "brevity"), "is no adapter: give --base"),
        (("--scorer", "brevity", "--top-p", "1.2"), "not a probability in (0, 1]"),
        (("--scorer", "brevity", "--temperature", "0"), "is not a positive number"),
        (("--scorer", "brevity", "--seed", "-1"), "is not a whole number"),
        (("--scorer", "brevity", "--before", "no.json"), "--before without a threshold"),
        (("--scorer", "brevity", "--base", "nowhere/at/all"), "nowhere/at/all: no such directory"),
        (("--scorer", "x=math:sqrt", "--base", "BASE"), "scorer 'x' failed"),
        (("--scorer", "brevity", "--base", "BASE", "--max-prompts", "1"), "1 prompt, which gives no interval"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_text_is_drawn(
    capsys, monkeypatch, base, prompts, tmp_path, arguments, said
):
    monkeypatch.setattr(compare, "draw", lambda *_: pytest.fail("drew"))
    arguments = [str(base) if x == "BASE" else x for x in arguments]
    code, _, err = run(capsys, base, prompts, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert said in err.splitlines()[-1]


def test_what_is_longer_than_the_model_is_refused(capsys, base, prompts, tmp_path, monkeypatch):
    lengths = []

    def refuse(model, longest):
        lengths.append(longest)
        raise ValueError("too long")

    monkeypatch.setattr(compare, "check_positions", refuse)
    code, _, err = run(capsys, base, prompts, "--base", base, *OPTIONS, "--output", tmp_path)
    assert (code, lengths) == (2, [len("Question 0?") + 6])
    assert "--max-new-tokens 6 behind the longest prompt: too long" in err


def test_a_base_of_another_vocabulary_is_refused(capsys, base, prompts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "other")
    code, _, err = run(capsys, base, prompts, "--base", tmp_path / "other", "--scorer", "brevity")
    assert (code, "has another vocabulary than" in err) == (2, True)


def test_texts_of_nothing_are_told(capsys, base, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *_: compare.Drawn([["", "a b"]] * 3, 0.0))
    code, out, _ = run(capsys, base, prompts, "--base", base, "--scorer", "brevity", "--output", tmp_path)
    assert (code, "50% of the model's texts, 50% of the base's are empty" in out) == (0, True)
