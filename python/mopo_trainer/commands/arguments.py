"""The arguments of `mopo train`, from a YAML file and the command line, as ScriptArguments and MOPOConfig.

Values of the file are taken as they are written (`no` is "no", 1e-5 a number, 2024 a name where a name is wanted) and
go through the command line's parser: both are checked in one place.
"""

from __future__ import annotations

import argparse
import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from mopo_trainer.commands.options import ScriptArguments, parser_texts
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.elsewhere import whats_instead

SWITCHES = {"on": "true", "yes": "true", "true": "true", "off": "false", "no": "false", "false": "false"}
NAMED_VALUES = ("thresholds", "scorers", "eval_dataset")  # may be {name: value}
SEVERAL = ("report_to", "optim_target_modules")  # transformers takes lists of them, its parser does not


class TrainParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line."""

    def __init__(self) -> None:
        super().__init__([ScriptArguments, MOPOConfig], **parser_texts())
        self.add_argument("--help-all", "--help_all", action="help", help="also list every TrainingArguments option")
        self.options = {action.dest: action for action in reversed(self._actions)}  # before its `no_` complement
        for name in SEVERAL:
            self.options[name].nargs = "+"
        self.options["include_num_input_tokens_seen"].type = _tokens_seen

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see mopo train --help)")


def _tokens_seen(text: str) -> str | bool:
    return text if text in ("all", "non_padding") else string_to_bool(text)


def parse_arguments(arguments: Sequence[str]) -> tuple[ScriptArguments, MOPOConfig]:
    """Script and trainer arguments from `[CONFIG.yaml] [--option value ...]`; the command line wins over the file.

    Raises:
        ValueError: an unknown option or YAML key (with what takes its place, or the nearest name), a value of the wrong
            type or range.
    """
    parser = TrainParser()
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        path, rest = Path(arguments[0]), arguments[1:]
        arguments = [*_yaml_arguments(path, parser, replaced=_named(rest)), *rest]
    script, config, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {name}{_instead(name.strip('-'), parser)}")
    if (config.resume_from_checkpoint or "").lower() in ("true", "false"):
        config.resume_from_checkpoint = config.resume_from_checkpoint.lower() == "true"
    config.optim_target_modules = target_modules(config.optim_target_modules)
    return script, config


def target_modules(names: Sequence[str] | None) -> str | list[str] | None:
    """Module names as peft and transformers take them: the word all-linear and a regex are strings, names a list."""
    names = [name.strip() for entry in names or [] for name in _split_names(entry)]
    special = [name for name in names if name == "all-linear" or _is_regex(name)]
    if special and len(names) > 1:
        raise ValueError(f"target modules {' '.join(names)}: {special[0]} stands alone; give it, or a list of names")
    return special[0] if special else names or None


def _split_names(entry: str) -> list[str]:
    return [entry] if _is_regex(entry) else [name for name in entry.split(",") if name.strip()]


def _is_regex(name: str) -> bool:
    return re.search(r"[\\*+?|()\[\]{}^$]", name) is not None


def _instead(name: str, parser: TrainParser) -> str:
    return whats_instead(name, parser.options) or "; mopo train --help-all lists the options"


def _named(arguments: Sequence[str]) -> set[str]:
    """The options that a command line names."""
    names = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")
    }
    return names | {f"{name}s" for name in names & {"threshold", "scorer"}}


# ---------------------------------------------------------------------------------------------------------- the file


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number, which YAML 1.1 takes for text."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml_arguments(path: Path, parser: TrainParser, replaced: set[str]) -> list[str]:
    """The content of a YAML file, less `replaced`, as command-line arguments; what is null becomes the default."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: mopo train takes a .yaml file and --options")
    arguments: list[str] = []
    seen: set[str] = set()
    for key, node, loader in _top_level(path):
        where = f"{path}, line {node.start_mark.line + 1}"
        if key not in parser.options:
            raise ValueError(f"{where}: unknown key {key!r}{_instead(key, parser)}")
        if key in seen:
            raise ValueError(f"{where}: {key} stands in the file a second time; keep one")
        seen.add(key)
        try:
            arguments += [] if key in replaced else _as_arguments(key, node, loader, parser)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return arguments


def _top_level(path: Path) -> Iterator[tuple[str, yaml.Node, YamlLoader]]:
    """(name, value, loader) of every line of the outermost mapping."""
    try:
        loader = YamlLoader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: expected lines of the form `name: value`")
        loader.flatten_mapping(root)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not valid YAML ({problem or error})") from None
    for key, value in root.value:
        yield str(key.value), value, loader


def _as_arguments(key: str, node: yaml.Node, loader: YamlLoader, parser: TrainParser) -> list[str]:
    option = parser.options[key]
    if isinstance(node, yaml.ScalarNode):
        if _is_null(node):
            _set_null(key, parser)
            return []
        return [f"--{key}={_scalar(node, option)}"]
    if key in NAMED_VALUES:
        values = list(_named_values(key, node))
    elif isinstance(node, yaml.SequenceNode) and option.nargs == "+":
        values = [_text(key, item) for item in node.value]
    elif isinstance(node, yaml.MappingNode) and key in MOPOConfig._VALID_DICT_FIELDS:
        return [f"--{key}={json.dumps(loader.construct_object(node, deep=True))}"]
    else:
        raise ValueError(f"{key} is a {_kind(node)} in the file; give one value")
    return [f"--{key}", *values] if values else []


def _scalar(node: yaml.ScalarNode, option: argparse.Action) -> str:
    """The text of a value; one of YAML's words for true and false is that where the option can be it."""
    switch = SWITCHES.get(node.value.lower()) if node.tag == "tag:yaml.org,2002:bool" else None
    if switch == "false" and "no" in (option.choices or []):
        return "no"
    is_switch = option.type is string_to_bool or option.dest == "resume_from_checkpoint"
    return switch if switch and is_switch else node.value


def _named_values(key: str, node: yaml.Node) -> Iterator[str]:
    """name=value of a mapping, a list of texts, or a list of mappings."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield f"{_text(key, name)}={_text(key, value)}"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _named_values(key, item)
    else:
        yield _text(key, node)


def _text(key: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise ValueError(f"{key} holds a {_kind(node)}; give text")
    return node.value


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null"
    return "list" if isinstance(node, yaml.SequenceNode) else "mapping"


def _is_null(node: yaml.ScalarNode) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _set_null(key: str, parser: TrainParser) -> None:
    """null is None where the option may be: max_length: null bounds nothing."""
    option = parser.options[key]
    if option.default is None or key == "report_to":  # report_to's default is none
        return
    hints = typing.get_type_hints(MOPOConfig) | typing.get_type_hints(ScriptArguments)
    if type(None) not in typing.get_args(hints[key]):
        raise ValueError(f"{key} is null; give a value, or leave the line out for {option.default}")
    parser.set_defaults(**{key: None})
