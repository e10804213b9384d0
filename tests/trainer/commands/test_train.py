"""`mopo train`: YAML and overrides, what a run leaves behind, resuming, and arguments that are refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mopo_trainer.commands import smollm
from mopo_trainer.commands.arguments import parse_arguments
from mopo_trainer.commands.main import main
from mopo_trainer.commands.train import load_groups, lora_config, summary_table
from mopo_trainer.training.callbacks import StepLines, step_line

REQUIRED = ["--model_name_or_path", "m", "--dataset", "d", "--report_to", "none"]


@pytest.fixture
def setup(tmp_path, monkeypatch, tokenizer, tiny_model, pairs):
    """A directory with a tiny model, eight labelled pairs and config.yaml; the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = {
        "model_name_or_path": "model",
        "dataset": "pairs.jsonl",
        "primary": "friendly",
        "thresholds": {"brief": 0.4},
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "max_steps": 3,
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": "run",
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def log_of(directory):
    return json.loads((Path(directory) / "training_log.json").read_text())


def losses(directory):
    return {row["step"]: row["loss"] for row in log_of(directory) if "loss" in row}


def test_a_run_leaves_model_curves_and_log(setup, capsys):
    assert main(["train", "config.yaml", "--eval_fraction", "0.25", "--max_steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "pairs.jsonl: 6 groups, 12 responses, primary friendly" in out
    assert "held-out loss" in out
    assert sorted(losses("run")) == [1, 2, 3, 4]
    last = [row for row in log_of("run") if "eval_loss" in row]
    assert [row["step"] for row in last] == [4]
    assert (Path("run") / "training.png").read_bytes().startswith(b"\x89PNG")
    trained = AutoModelForCausalLM.from_pretrained("run")
    before = AutoModelForCausalLM.from_pretrained("model")
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    # One line per step: loss, both objectives, the threshold with its multiplier.
    step = next(line for line in out.splitlines() if line.startswith("    1  loss"))
    assert "friendly 0." in step
    assert "(≥ 0.400, λ " in step


def test_held_out_sets_are_measured_each_under_its_name(setup, capsys):
    rows = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("near", rows[:4]), ("far", rows[4:])):
        Path(f"{name}.jsonl").write_text("".join(part))
    settings = yaml.safe_load(Path("config.yaml").read_text())
    settings |= {"eval_dataset": {"near": "near.jsonl", "far": "far.jsonl"}, "max_steps": 1}
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "config.yaml"]) == 0
    out = capsys.readouterr().out
    assert "held-out near loss" in out
    assert "held-out far loss" in out
    found = {key for row in log_of("run") for key in row if key.endswith("win_rate/brief")}
    assert found == {"win_rate/brief", "eval_near_win_rate/brief", "eval_far_win_rate/brief"}
    script, config = parse_arguments(["config.yaml"])
    _, sets = load_groups(script, config)
    assert {name: len(groups) for name, groups in sets.items()} == {"near": 4, "far": 4}


def test_the_command_line_wins_over_the_file(setup):
    script, config = parse_arguments(["config.yaml", "--max_steps", "7", "--thresholds", "brief=0.3", "--lora-r", "4"])
    assert (config.max_steps, config.threshold_map(), script.lora_r) == (7, {"brief": 0.3}, 4)
    assert (config.learning_rate, config.primary, config.disable_tqdm) == (1e-3, "friendly", True)


def test_yaml_values_become_what_the_fields_want(tmp_path):
    settings = {
        "model_name_or_path": "m",
        "dataset": "d",
        "scorers": ["brevity", "x=friendliness"],
        "thresholds": ["brevity=0.5"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "logging_first_step": True,
        "lag_steps": None,
        "eps": 0.01,
        "report_to": "none",
        "lora_target_modules": [],
    }
    file = tmp_path / "c.yml"
    file.write_text(yaml.safe_dump(settings))
    script, config = parse_arguments([str(file)])
    assert config.scorers == ["brevity", "x=friendliness"]
    assert config.threshold_map() == {"brevity": 0.5}
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.logging_first_step is True
    assert (config.lag_steps, config.robust_radius()) == (None, 0.01)
    assert script.lora_target_modules is None


def test_resuming_goes_on_where_the_run_stopped(setup, capsys):
    assert main(["train", "config.yaml", "--max_steps", "4"]) == 0
    uninterrupted = losses("run")
    Path("run/checkpoint-4").rename("elsewhere")  # as if the run had been stopped after its first checkpoint, at step 2
    for name in ("training_log.json", "training.png", "model.safetensors"):
        Path("run", name).unlink()
    capsys.readouterr()
    assert main(["train", "config.yaml", "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    steps = [line for line in capsys.readouterr().out.splitlines() if "  loss " in line]
    assert [int(line.split()[0]) for line in steps] == [3, 4]
    assert losses("run") == uninterrupted


def test_lora_trains_an_adapter(setup, capsys):
    assert main(["train", "config.yaml", "--lora_r", "2", "--max_steps", "1", "--save_strategy", "no"]) == 0
    config = json.loads((Path("run") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    base = AutoModelForCausalLM.from_pretrained("model")
    assert isinstance(PeftModel.from_pretrained(base, "run"), PeftModel)


def test_lora_options_reach_peft():
    script, _ = parse_arguments(
        [*REQUIRED, "--lora_r", "8", "--lora_alpha", "4", "--lora_target_modules", "q_proj", "o_proj"]
    )
    made = lora_config(script)
    assert (made.r, made.lora_alpha, set(made.target_modules)) == (8, 4.0, {"q_proj", "o_proj"})
    assert lora_config(parse_arguments(REQUIRED)[0]) is None


def test_scorers_add_objectives_and_are_not_applied_twice(setup):
    script, config = parse_arguments(["config.yaml", "--scorers", "brevity", "--eval_dataset", "pairs.jsonl"])
    groups, held_out = load_groups(script, config)
    assert list(groups.features["win_rate"]) == list(held_out.features["win_rate"]) == ["friendly", "brief", "brevity"]
    assert config.scorers is None


def test_one_option_in_either_spelling_and_as_often_as_wanted(setup):
    options = [
        "--threshold",
        "brief=0.3",
        "--threshold",
        "brevity=0.2",
        "--scorer",
        "brevity",
        "--scorer",
        "friendliness",
    ]
    _, config = parse_arguments(["config.yaml", *options])
    assert config.threshold_map() == {"brief": 0.3, "brevity": 0.2}  # instead of the file's
    assert config.scorers == ["brevity", "friendliness"]
    _, config = parse_arguments(["config.yaml", "--thresholds", "brief=0.3", "brevity=0.2"])
    assert config.threshold_map() == {"brief": 0.3, "brevity": 0.2}


def test_a_subset_and_a_name_for_unlabelled_pairs(setup):
    rows = [{"prompt": f"{i}?", "chosen": "Yes, sir.", "rejected": "No."} for i in range(6)]
    Path("bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"dataset": "bare.jsonl", "preferred": "harmless", "max_train_samples": "2", "eval_fraction": "0.5"}
    script, config = parse_arguments(["config.yaml", *(f"--{name}={value}" for name, value in options.items())])
    groups, held_out = load_groups(script, config)
    assert (len(groups), len(held_out)) == (2, 3)
    assert list(groups.features["win_rate"]) == ["harmless"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "--max_train_samples", "0"], "max_train_samples=0 must be at least 1"),
        ([], "model_name_or_path is not set"),
        (["--model_name_or_path", "model"], "dataset is not set"),
        (["pairs.jsonl"], "takes a .yaml file"),
        (["config.yaml", "extra.yaml"], "unknown argument extra.yaml"),
        (["config.yaml", "--max_step", "3"], "unknown argument --max_step; did you mean max_steps?"),
        (["config.yaml", "--max_steps", "few"], "invalid int value: 'few'"),
        (["config.yaml", "--policy_step", "clown"], "invalid choice: 'clown'"),
        (["config.yaml", "--tau", "0"], "tau=0.0 must be positive"),
        (["config.yaml", "--thresholds", "brief"], "'brief' is not of the form objective=value"),
        (["config.yaml", "--thresholds", "brief=0.9", "--eps", "0.5"], "'brief' must reach 0.9"),
        (["config.yaml", "--thresholds", "speed=0.9"], "unknown objective 'speed'"),
        (["config.yaml", "--primary", "speed"], "primary 'speed' is not in the data; it has: friendly, brief"),
        (["config.yaml", "--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["config.yaml", "--eval_fraction", "1"], "eval_fraction=1.0 must lie in [0, 1)"),
        (["config.yaml", "--eval_fraction", ".1", "--eval_dataset", "pairs.jsonl"], "are both set; choose one"),
        (["config.yaml", "--lora_r", "-1"], "lora_r=-1 must be 0"),
        (["config.yaml", "--model_name_or_path", "./nowhere"], "model_name_or_path=./nowhere"),
        (["config.yaml", "--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
        (["config.yaml", "--resume_from_checkpoint", "run/checkpoint-9"], "there is no such directory"),
        (["unknown.yaml"], "unknown.yaml, line 1: unknown key 'datset'; did you mean dataset?"),
        (["broken.yaml"], "broken.yaml, line 2: not valid YAML"),
        (["list.yaml"], "list.yaml: expected lines of the form"),
    ],
)
def test_wrong_arguments_get_one_line(setup, capsys, arguments, message):
    Path("unknown.yaml").write_text("datset: pairs.jsonl\n")
    Path("broken.yaml").write_text("dataset: [a\n")
    Path("list.yaml").write_text("- dataset\n")
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("run").exists()


def test_the_primary_must_be_named(setup, capsys):
    settings = yaml.safe_load(Path("config.yaml").read_text())
    Path("config.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "primary"}))
    assert main(["train", "config.yaml"]) == 2
    assert "primary is not set; choose the objective to maximise among friendly, brief" in capsys.readouterr().err


def test_a_model_that_cannot_be_fetched_gets_one_line(setup, capsys, monkeypatch):
    def fail():
        raise smollm.ModelUnavailable("no network")

    monkeypatch.setattr(smollm, "smollm2", fail)
    assert main(["train", "config.yaml", "--model_name_or_path", "smollm2"]) == 2
    assert capsys.readouterr().err == "mopo: error: no network\n"


def test_help_shows_our_options_and_all_of_them_on_request(capsys):
    for option, listed in (("--help", False), ("--help-all", True)):
        with pytest.raises(SystemExit):
            main(["train", option])
        out = capsys.readouterr().out
        assert "--thresholds STR ..." in out
        assert "--lora_r INT" in out
        assert ("--adam_beta2" in out) is listed


def test_step_lines():
    logs = {"loss": 2.0, "win_rate/a": 0.8, "win_rate/b": 0.5, "threshold/b": 0.6, "multiplier/b": 0.25}
    assert step_line(logs) == "loss 2.0000  a 0.800  b 0.500 (≥ 0.600, λ 0.250)"
    assert step_line({"eval_loss": 1.0, "eval_win_rate/a": 0.5}) == "held-out loss 1.0000  a 0.500"
    assert step_line({"eval_x_y_loss": 1.0, "eval_x_y_win_rate/a": 0.5}) == "held-out x_y loss 1.0000  a 0.500"
    assert step_line({"train_runtime": 3.0}) is None
    assert StepLines().on_log(None, type("State", (), {"is_world_process_zero": False}), None, logs) is None


def test_the_summary_holds_the_last_values():
    history = [
        {"step": 1, "multiplier/b": 0.1},
        {"step": 2, "multiplier/b": 0.2, "threshold/b": 0.6},
        {"eval_win_rate/a": 0.7},
    ]
    table = summary_table(history, ["a", "b"])
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["a", "b"], ["–", "0.600"], ["–", "0.200"], ["0.700", "–"], ["–", "–"]]
    sets = [{"step": 1, "eval_x_y_loss": 1.0, "eval_x_y_win_rate/a": 0.3}, {"step": 1, "eval_z_loss": 1.0}]
    table = summary_table(sets, ["a"])
    headings = [column.header for column in table.columns][3:]
    assert headings == [f"held-out {kind} {of}" for of in ("x_y", "z") for kind in ("win rate", "agreement")]
    assert list(table.columns[3].cells) == ["0.300"]
