import sys

import pytest

from mopo_trainer.data.scorers import load_scorers, scorer
from mopo_trainer.data.sources import DataError

BETTER_AND_WORSE = {
    "brevity": ("Two words.", "Here are four words."),
    "friendliness": ("I love this, thank you, you are wonderful!", "I hate this, you are horrible."),
    "plain_language": (
        "The cat sat on the mat.",
        "Incomprehensible regulations necessitate interdepartmental mediation.",
    ),
}


@pytest.mark.parametrize("name", BETTER_AND_WORSE)
def test_built_in_scorers_prefer_what_their_name_says(name):
    resolved, function = scorer(name)
    better, worse = BETTER_AND_WORSE[name]
    assert resolved == name
    assert function("Anything?", better) > function("Anything?", worse)


def test_brevity_counts_words():
    assert scorer("brevity")[1]("p", "one  two\nthree") == -3


def test_built_in_under_another_name():
    name, function = scorer("short=brevity")
    assert name == "short"
    assert function is scorer("brevity")[1]


def test_own_function_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_scorers_for_test.py").write_text(
        "class Shouting:\n    def score(prompt, response):\n        return len(prompt)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    name, function = scorer("shouting=own_scorers_for_test:Shouting.score")
    assert name == "shouting"
    assert function("abc", "x") == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "humour",
            r"'humour': no such scorer; give one of brevity, friendliness, plain_language, or name=module:function",
        ),
        ("x=humour", r"'x=humour': no such scorer"),
        ("math:exp", r"'math:exp': no such scorer"),  # without a name there is no objective to call it by
        ("", r"'': no such scorer"),
        ("x=no_such_module:f", r"cannot be imported \(ModuleNotFoundError: .*no_such_module.*check both names"),
        ("x=math:no_such_function", r"cannot be imported \(AttributeError"),
        ("x=math:pi", r"pi is no function"),
    ],
)
def test_spec_that_cannot_be_resolved(spec, message):
    with pytest.raises(DataError, match=message):
        scorer(spec)


def test_load_scorers():
    assert list(load_scorers(["brevity", "root=math:hypot"])) == ["brevity", "root"]
    with pytest.raises(DataError, match="duplicate objective names: two scorers are called 'brevity'"):
        load_scorers(["brevity", "brevity=math:hypot"])
