"""The help of `mopo train`, which imports no transformers, says what the parser that does import it would do."""

import re

import pytest
from transformers import TrainingArguments

from mopo_trainer.commands import options
from mopo_trainer.commands.arguments import TrainParser
from mopo_trainer.commands.main import main
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.options import MOPOOptions

SHOWN = {
    name: cls.__dataclass_fields__[name].default
    for cls in (options.ScriptArguments, options.SharedOptions, MOPOOptions)
    for name in cls.__dataclass_fields__
    if name not in options.HIDDEN
}


@pytest.fixture(scope="module")
def actions():
    """The real parser's, by name."""
    return {action.dest: action for action in TrainParser()._actions}


def listed(capsys):
    """{name: default as printed} of the help."""
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = capsys.readouterr().out.partition("\nexamples:")[0]
    entries = re.split(r"\n  (?=-)", lines)[1:]
    found = {}
    for entry in entries:
        default = re.search(r"\[([^\[\]]*)\]$", " ".join(entry.split()))
        found[re.match(r"(?:-h, )?--([\w-]+)", entry)[1]] = default and default[1]
    return found


def test_every_option_of_ours_is_listed_with_its_default(capsys):
    found = listed(capsys)
    assert set(found) - {"help", "help-all"} == set(SHOWN)
    for name, default in SHOWN.items():
        assert found[name] == (None if default is None else str(default)), name


def test_the_help_names_all_that_the_config_adds_or_changes():
    inherited = TrainingArguments.__dataclass_fields__
    ours = {
        name
        for name, field in MOPOConfig.__dataclass_fields__.items()
        if name not in inherited or field.default != inherited[name].default
    }
    assert set(MOPOOptions.__dataclass_fields__) == ours
    assert ours - options.HIDDEN <= set(SHOWN)
    assert {name: getattr(MOPOConfig, name) for name in options.HIDDEN} == {"remove_unused_columns": False}


def test_shown_defaults_types_and_choices_are_the_real_ones(actions, monkeypatch):
    parsers = []
    monkeypatch.setattr(options.argparse.ArgumentParser, "print_help", lambda parser: parsers.append(parser))
    options.print_help()
    shown = {action.dest: action for action in parsers[0]._actions}
    config = MOPOConfig(use_cpu=True)
    for name, default in SHOWN.items():
        real = actions[name]
        assert shown[name].default == default == getattr(config, name, real.default), name
        assert (shown[name].choices and list(shown[name].choices)) == (real.choices and list(real.choices)), name
        assert (shown[name].nargs == "+") == (real.nargs == "+"), name
        assert shown[name].type is None or shown[name].type(3) == real.type("3"), name
