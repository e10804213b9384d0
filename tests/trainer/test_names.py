"""What is said of a name that does not exist."""

import pytest

from mopo_trainer.names import did_you_mean, it_has

NAMES = ["max_steps", "a_b_c_d", "brevity"]


@pytest.mark.parametrize(("name", "near"), [("max_step", "max_steps"), ("a-b-c-d", "a_b_c_d"), ("brevty", "brevity")])
def test_the_nearest_name_is_offered(name, near):
    assert did_you_mean(name, iter(NAMES)) == f"; did you mean {near}?"


def test_all_names_are_listed_and_a_far_one_gets_no_suggestion():
    assert did_you_mean("zzz", NAMES) == ""
    assert it_has("zzz", iter(NAMES)) == "it has: max_steps, a_b_c_d, brevity"
    assert it_has("brevty", iter(NAMES)) == "it has: max_steps, a_b_c_d, brevity; did you mean brevity?"
