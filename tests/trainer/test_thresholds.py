"""Thresholds as users write them."""

import pytest

from mopo_trainer.thresholds import parse_thresholds


def test_thresholds_from_strings_and_mappings():
    assert parse_thresholds(["a=0.5", "b_c=1"]) == {"a": 0.5, "b_c": 1.0}
    assert parse_thresholds({"a": 0.5, "b": "0.25"}) == {"a": 0.5, "b": 0.25}
    assert parse_thresholds(None) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["a"], "'a' is not of the form objective=value"),
        (["=0.5"], "is not of the form"),
        (["a=high"], "a=high is not a win rate"),
        (["a=1.5"], "a=1.5 is not a win rate"),
        (["a=nan"], "a=nan is not a win rate"),
        (["a=0.5", "a=0.6"], "name 'a' twice"),
    ],
)
def test_wrong_thresholds_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        parse_thresholds(wrong)
