"""What people write in YAML files becomes what they mean, or one line."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from mopo_trainer.commands.arguments import parse_arguments, target_modules
from mopo_trainer.commands.options import ScriptArguments
from mopo_trainer.commands.train import lora_config
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.elsewhere import ELSEWHERE

BASE = "model_name_or_path: m\ndataset: d\nuse_cpu: true\n"


def parsed(tmp_path, text, *arguments):
    file = tmp_path / "config.yaml"
    file.write_text(BASE + text)
    return parse_arguments([str(file), *arguments])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("save_strategy: no", "no"),
        ("eval_strategy: no", "no"),
        ("logging_strategy: No", "no"),
        ("save_strategy: false", "no"),
        ("resume_from_checkpoint: yes", True),
        ("resume_from_checkpoint: off", False),
        ("resume_from_checkpoint: 'yes'", "yes"),
        ("logging_strategy: 'no'", "no"),
        ("save_strategy: steps", "steps"),
        ("primary: no", "no"),
        ("primary: yes", "yes"),
        ("run_name: on", "on"),
        ("run_name: 2024", "2024"),
        ("run_name: 2024-01-02", "2024-01-02"),
        ("run_name: 007", "007"),
        ("run_name: 1:30", "1:30"),
        ("run_name: 'null'", "null"),
        ("hub_revision: 1e5", "1e5"),
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: '1e-5'", 1e-5),
        ("learning_rate: 1", 1.0),
        ("weight_decay: .1", 0.1),
        ("eps: 0.01", "0.01"),
        ("eps: 1e-2", "1e-2"),
        ("max_steps: 1_000", 1000),
        ("bf16: on", True),
        ("bf16: Off", False),
        ("logging_first_step: yes", True),
        ("logging_first_step: 1", True),
        ("disable_tqdm: no", False),
        ("report_to: none", []),
        ("report_to: null", []),
        ("report_to: [none]", []),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("report_to: tensorboard", ["tensorboard"]),
        ("include_num_input_tokens_seen: non_padding", "non_padding"),
        ("include_num_input_tokens_seen: true", "all"),
        ("include_num_input_tokens_seen: no", "no"),
        ("thresholds: {a: 0.5, b: 1e-1}", ["a=0.5", "b=1e-1"]),
        ("thresholds: {yes: 0.5}", ["yes=0.5"]),
        ("thresholds: [a=0.5, b: 0.4]", ["a=0.5", "b=0.4"]),
        ("thresholds: a=0.5", ["a=0.5"]),
        ("scorers: {short: brevity}", ["short=brevity"]),
        ("scorers: brevity", ["brevity"]),
        ("max_length: null", None),
        ("max_length:", None),
        ("max_length: ~", None),
        ("lag_steps: null", None),
        ("lr_scheduler_kwargs: {min_lr: 1e-6, num_cycles: 2}", {"min_lr": 1e-6, "num_cycles": 2}),
        ("gradient_checkpointing_kwargs: {use_reentrant: no}", {"use_reentrant": False}),
        ("optim_target_modules: all-linear", "all-linear"),
        ("optim_target_modules: [attn, mlp]", ["attn", "mlp"]),
    ],
)
def test_a_value_is_what_the_file_says(tmp_path, line, value):
    name = line.partition(":")[0]
    _, config = parsed(tmp_path, line)
    found = getattr(config, name)
    assert found == value
    assert type(found) is type(value) or str in type(found).__mro__  # strategies are strings and enumerations


def test_null_gives_way_to_the_command_line(tmp_path):
    _, config = parsed(tmp_path, "max_length: null", "--max_length", "64")
    assert config.max_length == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: null", r"line 4: learning_rate is null; give a value, or leave the line out for 5e-05"),
        ("seed: 1\nseed: 2", "line 5: seed stands in the file a second time"),
        ("run_name: [a, b]", "line 4: run_name is a list in the file; give one value"),
        ("run_name: {a: b}", "line 4: run_name is a mapping in the file; give one value"),
        ("scorers: [a, null]", "line 4: scorers holds a null; give text"),
        ("thresholds: {a: [1]}", "line 4: thresholds holds a list; give text"),
        ("thresholds: {a: 0.5, a: 0.6}", "thresholds name 'a' twice"),
        ("thresholds: 0.6", "'0.6' is not of the form objective=value"),
        ("max_steps: 10.0", "invalid int value: '10.0'"),
        ("seed: no", "invalid int value: 'no'"),
        ("save_strategy: yes", "invalid choice: 'yes'"),
        ("bf16: maybe", "Truthy value expected: got maybe"),
        ("max_step: 3", "line 4: unknown key 'max_step'; did you mean max_steps"),
        ("zzz: 3", "line 4: unknown key 'zzz'; mopo train --help-all lists the options"),
        ("lora_alpha: 16", "lora_alpha is set and lora_r is 0"),
        ("lora_target_modules: all-linear", "lora_target_modules is set and lora_r is 0"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor=0.1: labels are probabilities"),
        ("eval_dataset: [a.jsonl, b.jsonl]", "eval_dataset 'a.jsonl' is one of several; write name=source"),
        ("eval_dataset: [a=x, a=y]", "eval_dataset names 'a' twice"),
    ],
)
def test_what_makes_no_sense_gets_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all-linear", "all-linear"),
        ("[all-linear]", "all-linear"),
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("[q_proj, v_proj]", {"q_proj", "v_proj"}),
        ("[self_attn.q_proj]", {"self_attn.q_proj"}),
        (r"'.*\.layers\.(0|1)\..*_proj'", r".*\.layers\.(0|1)\..*_proj"),
        (r"'.*{1,2}q_proj'", r".*{1,2}q_proj"),
        ("[]", "all-linear"),
        ("null", "all-linear"),
    ],
)
def test_target_modules_reach_peft_as_it_takes_them(tmp_path, given, expected):
    script, _ = parsed(tmp_path, f"lora_r: 4\nlora_target_modules: {given}")
    assert lora_config(script).target_modules == expected


def test_a_word_for_all_modules_stands_alone():
    with pytest.raises(ValueError, match="all-linear stands alone"):
        target_modules(["all-linear", "lm_head"])


def test_the_scale_of_an_adapter_is_a_whole_number_where_it_can_be(tmp_path):
    for line, alpha in (("", 8), ("lora_alpha: 16", 16), ("lora_alpha: 0.5", 0.5)):
        made = lora_config(parsed(tmp_path, f"lora_r: 4\n{line}")[0])
        assert (made.lora_alpha, type(made.lora_alpha)) == (alpha, type(alpha))


def test_held_out_sets_by_name(tmp_path):
    for text in ("{a: x.jsonl, b: y.jsonl}", "[a=x.jsonl, b=y.jsonl]", "[{a: x.jsonl}, {b: y.jsonl}]"):
        script, _ = parsed(tmp_path, f"eval_dataset: {text}")
        assert script.eval_sets() == {"a": "x.jsonl", "b": "y.jsonl"}
    assert parsed(tmp_path, "eval_dataset: x.jsonl")[0].eval_sets() == {"": "x.jsonl"}
    odd = tmp_path / "day=1"
    odd.mkdir()
    assert parsed(tmp_path, f"eval_dataset: {odd}")[0].eval_sets() == {"": str(odd)}
    assert parsed(tmp_path, "")[0].eval_sets() == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beta", "tau takes its place"),
        ("loss_type", "policy_step takes its place: contrast for sigmoid, regress for ipo"),
        ("max_completion_length", "max_length bounds prompt"),
        ("use_peft", "lora_r > 0 trains an adapter"),
        ("dataset_name", "dataset takes its place"),
        ("torch_dtype", "dtype takes its place"),
    ],
)
def test_options_of_trl_are_told_what_takes_their_place(tmp_path, name, message):
    with pytest.raises(ValueError, match=f"line 4: unknown key '{name}': .*{message}"):
        parsed(tmp_path, f"{name}: 1")
    for argument in ([f"--{name}", "1"], [f"--{name.replace('_', '-')}=1"]):
        with pytest.raises(ValueError, match=f"unknown argument {argument[0].split('=')[0]}: .*{message}"):
            parsed(tmp_path, "", *argument)
    with pytest.raises(TypeError, match=f"MOPOConfig has no option '{name}': .*{message}"):
        MOPOConfig(**{name: 1})


def test_every_option_of_trl_is_ours_or_has_its_line():
    trl = pytest.importorskip("trl")
    known = {
        field.name for kind in (TrainingArguments, MOPOConfig, ScriptArguments) for field in dataclasses.fields(kind)
    }
    theirs = {
        f.name for kind in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(kind)
    }
    assert theirs - known - set(ELSEWHERE) == set()
    assert not set(ELSEWHERE) & known


def test_a_file_with_a_byte_order_mark(tmp_path):
    file = Path(tmp_path / "config.yml")
    file.write_text("\ufeff" + BASE + "seed: 7\n", encoding="utf-8")
    assert parse_arguments([str(file)])[1].seed == 7
    file.write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(ValueError, match=r"config.yml: not UTF-8 text at byte 13"):
        parse_arguments([str(file)])


def test_merged_keys_and_anchors(tmp_path):
    _, config = parsed(tmp_path, "seed: &s 7\ndata_seed: *s\n")
    assert (config.seed, config.data_seed) == (7, 7)
