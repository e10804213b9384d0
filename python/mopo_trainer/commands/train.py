"""`mopo train`: arguments from a YAML file and the command line, data, model, MOPOTrainer, curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import set_seed

from mopo_kernels.objective.dual import auto_eps
from mopo_trainer import data
from mopo_trainer.commands.options import ScriptArguments, parser_texts
from mopo_trainer.commands.solve import LabelProblem, objective_rows, objectives_table
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.files import write_json
from mopo_trainer.names import did_you_mean, it_has
from mopo_trainer.report import plots
from mopo_trainer.report.tables import new_table
from mopo_trainer.training.callbacks import Bar, StepLines
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.resume import resolve_checkpoint
from mopo_trainer.training.trainer import MOPOTrainer

# ---------------------------------------------------------------------------------------------------------- arguments


class TrainParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line."""

    def __init__(self) -> None:
        super().__init__([ScriptArguments, MOPOConfig], **parser_texts())
        self.add_argument("--help-all", "--help_all", action="help", help="also list every TrainingArguments option")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see mopo train --help)")


def parse_arguments(arguments: Sequence[str]) -> tuple[ScriptArguments, MOPOConfig]:
    """Script and trainer arguments from `[CONFIG.yaml] [--option value ...]`; the command line wins over the file.

    Raises:
        ValueError: an unknown option or YAML key (with the nearest name), a value of the wrong type or range.
    """
    parser = TrainParser()
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = [*_yaml_arguments(Path(arguments[0]), parser, replaced=_named(arguments[1:])), *arguments[1:]]
    script, config, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]}{_suggestion(unknown[0].strip('-'), parser)}")
    if (config.resume_from_checkpoint or "").lower() in ("true", "false"):
        config.resume_from_checkpoint = config.resume_from_checkpoint.lower() == "true"
    return script, config


def _named(arguments: Sequence[str]) -> set[str]:
    """The options that a command line names."""
    names = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")
    }
    return names | {f"{name}s" for name in names & {"threshold", "scorer"}}


def _yaml_arguments(path: Path, parser: TrainParser, replaced: set[str]) -> list[str]:
    """The content of a YAML file, less `replaced`, as command-line arguments: both are checked in one place."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: mopo train takes a .yaml file and --options")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not valid YAML ({problem or error})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected lines of the form `name: value`")
    options = {action.dest for action in parser._actions}
    arguments = []
    for key, value in content.items():
        if key not in options:
            raise ValueError(f"{path}: unknown key {key!r}{_suggestion(str(key), parser)}")
        arguments += [] if key in replaced else _as_arguments(key, value)
    return arguments


def _as_arguments(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if key == "thresholds" and isinstance(value, Mapping):
        value = [f"{name}={bound}" for name, bound in value.items()]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)] if value else []
    if isinstance(value, Mapping):
        value = json.dumps(value)
    return [f"--{key}={value}"]


def _suggestion(name: str, parser: TrainParser) -> str:
    options = [action.dest for action in parser._actions]
    return did_you_mean(name, options) or "; mopo train --help-all lists the options"


# ---------------------------------------------------------------------------------------------------------- the run


def run_train(arguments: Sequence[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    script, config = parse_arguments(arguments)
    set_seed(config.seed)
    if not torch.accelerator.is_available():
        config.dataloader_pin_memory = False  # torch warns on every run otherwise
    if config.resume_from_checkpoint:
        resolve_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)  # fails before the data are read
    train_groups, eval_groups = load_groups(script, config)
    console = Console(quiet=config.process_index != 0)
    print_plan(script.dataset or "", train_groups, config, console)
    model, tokenizer = load_model(script)
    trainer = MOPOTrainer(
        model, config, train_groups, eval_groups, processing_class=tokenizer, peft_config=lora_config(script)
    )
    trainer.remove_callback(PrinterCallback if config.disable_tqdm else ProgressCallback)
    trainer.add_callback(StepLines)
    if not config.disable_tqdm:
        trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    history = trainer.state.log_history
    if eval_groups is not None and not _evaluated_at(history, trainer.state.global_step):
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        objectives, output = trainer.dual.objectives, Path(config.output_dir)
        plots.plot_training(history, output / "training.png", objectives=objectives)
        write_json(output / "training_log.json", history)
        console.print(summary_table(history, objectives))
        console.print(f"Written: {output} (model, training.png, training_log.json)", soft_wrap=True)
    return 0


def load_groups(script: ScriptArguments, config: MOPOConfig) -> tuple[Dataset, Dataset | None]:
    """Training groups and held-out groups, scorers applied (the trainer is told that they are)."""

    def read(source: str, split: str) -> Dataset:
        rows = data.load_rows(source, split=split, name=script.dataset_name)
        scorers = load_scorers(config.scorers or [])
        return data.to_groups(
            rows,
            scorers=scorers,
            rating_scale=config.rating_scale,
            adapter=script.adapter,
            preferred=script.preferred,
        )

    groups, held_out = read(script.dataset or "", script.dataset_split), None
    if script.eval_dataset:
        held_out = read(script.eval_dataset, script.eval_split)
    elif script.eval_fraction:
        groups, held_out = data.split_groups(groups, script.eval_fraction, config.data_seed or config.seed)
    if script.max_train_samples is not None:
        groups = groups.select(range(min(script.max_train_samples, len(groups))))
    config.scorers = None
    return groups, held_out


def print_plan(source: str, groups: Dataset, config: MOPOConfig, console: Console) -> None:
    """Solve the labels before the model is loaded: what the run aims at, or at once why it cannot get there."""
    names = data.objectives(groups)
    if config.primary is None:
        raise ValueError(f"primary is not set; choose the objective to maximise among {', '.join(names)}")
    if config.primary not in names:
        raise ValueError(f"primary {config.primary!r} is not in the data; {it_has(config.primary, names)}")
    order = (config.primary, *(name for name in names if name != config.primary))
    win_rate, group = data.labels(groups, order)
    radius = config.robust_radius()
    if radius == "auto":
        radius = auto_eps(win_rate, group, beta=config.ratchet_beta)
    problem = LabelProblem(source, order, win_rate, group, config.tau, radius)
    rows = objective_rows(problem, config.threshold_map())
    console.print(problem.headline, style="bold", soft_wrap=True)
    console.print(objectives_table(rows, len(groups)))


def load_model(script: ScriptArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer.

    Raises:
        ValueError: neither a directory with a model nor a name that can be fetched.
    """
    source = script.model_name_or_path or ""
    if source == "smollm2":
        from mopo_trainer.commands.smollm import smollm2  # downloads and converts: only for those who ask

        source = str(smollm2())
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), AutoTokenizer.from_pretrained(source)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model_name_or_path={source}: no such directory, or no model in it ({reason})") from error


def lora_config(script: ScriptArguments) -> Any:
    """peft's LoraConfig, or None without an adapter."""
    if script.lora_r == 0:
        return None
    from peft import LoraConfig  # optional dependency

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=2 * script.lora_r if script.lora_alpha is None else script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=script.lora_target_modules or "all-linear",
    )


# ---------------------------------------------------------------------------------------------------------- reporting


def summary_table(history: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> Table:
    """Last thresholds, multipliers and held-out win rates of a run."""
    last: dict[str, Any] = {}
    for row in history:
        last.update(row)
    headings = ("threshold", "multiplier", "held-out win rate", "held-out agreement")
    table = new_table("At the end", "objective", *headings)
    for name in objectives:
        keys = (f"threshold/{name}", f"multiplier/{name}", f"eval_win_rate/{name}", f"eval_agreement/{name}")
        table.add_row(name, *(f"{last[key]:.3f}" if key in last else "–" for key in keys))
    return table


def _evaluated_at(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any("eval_loss" in row and row["step"] == step for row in history)
