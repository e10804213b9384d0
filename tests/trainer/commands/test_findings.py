"""What figures are said to mean: every sentence from figures made by hand."""

import pytest

from mopo_trainer.commands.findings import findings, two_digits


def row(objective, free, **changes):
    """An objective without a threshold, whose intervals reach 0.02 to both sides."""
    figures = {
        "objective": objective, "labelled_groups": 40, "reference": 0.5, "free": free, "free_win_rate": free,
        "free_interval": [free - 0.02, free + 0.02], "threshold": None, "win_rate": free,
        "interval": [free - 0.02, free + 0.02], "multiplier": 0.0, "cost": None, "largest_eps": None, "sure": False,
    }  # fmt: skip
    return figures | changes


def said(*secondaries, correlations=None, **changes):
    rows = [row("a", 0.9), *secondaries]
    found = {
        "primary": "a", "group_size": 4, "objectives": rows, "safe": None, "bound_of_one": 0.19, "sweeps": [],
        "rank_correlations": [[1.0, *(correlations or [0.0] * len(secondaries))]],
    }  # fmt: skip
    return dict(findings(found | changes))


def test_what_the_primary_does_to_the_others():
    assert said(row("b", 0.3), row("c", 0.51), row("d", 0.7), correlations=[-0.6, None, 0.4])["conflict"] == (
        "a alone lowers b (0.300 [.28, .32], rank correlation -0.60), does not move c (0.510 [.49, .53]), "
        "raises d (rank correlation +0.40)."
    )


def test_objectives_that_agree_need_no_second():
    assert said(row("b", 0.7), row("c", 0.8), correlations=[0.6, 0.9]) == {
        "conflict": "a alone raises every other objective (rank correlation +0.60 to +0.90). "
        "One objective would do, unless more than `free` is asked of another."
    }


def test_thresholds_that_do_not_bind_are_said_to_need_no_second_objective():
    found = said(row("b", 0.7, threshold=0.6, cost=0.0), correlations=[0.6])
    assert found["binding"] == "No threshold binds: a alone holds b. One objective would do."
    assert found["labels"] == (
        "95% intervals over prompts: b 0.700 [.68, .72] on 40 prompts. Every threshold lies below its interval."
    )
    assert "gain" not in found


def test_thresholds_within_groups_are_less_against_fresh_texts():
    sure = row("b", 0.7, threshold=0.6, cost=0.0, sure=True)
    assert said(sure, group_size=2)["fresh"] == (
        "b 0.6 among 2 responses is about 0.53 against fresh texts; to hold 0.6 there too, ask 0.80. "
        "(If comparisons are right and seldom tie.)"
    )
    high = said(row("b", 0.7, threshold=0.8, cost=0.0, sure=True), group_size=2)["fresh"]
    assert "about 0.60 against fresh texts; to hold 0.8 there too, no threshold of groups of 2 is enough" in high
    assert "fresh" not in said(row("b", 0.7, threshold=0.6, cost=0.0), row("c", 0.7, sure=True))


BOUND = row("b", 0.4, threshold=0.6, win_rate=0.6, interval=[0.55, 0.65], multiplier=0.5, cost=0.1, largest_eps=0.0137)


def test_binding_thresholds_are_told_from_the_others():
    free = row("c", 0.7, threshold=0.5, cost=0.0)
    assert said(BOUND)["binding"] == "b."
    assert said(BOUND, free)["binding"] == "b; c holds without a price."
    assert said(BOUND, free, {**free, "objective": "d"})["binding"] == "b; c and d hold without a price."


def test_what_makes_a_threshold_safe():
    sentence = "95% intervals over prompts: b 0.600 [.55, .65] on 40 prompts. On other prompts of the kind b may miss "
    safe = {"eps": 0.002, "multipliers": [1, 0.7], "win_rates": [0.81, 0.66]}
    assert said(BOUND, safe=safe)["labels"] == (
        f"{sentence}the threshold. --eps 0.002 makes it safe: λ 0.700 for b, a 0.810 instead of 0.900."
    )
    assert said(BOUND)["labels"] == (
        f"{sentence}the threshold. No eps makes it safe: lower the threshold or label more prompts."
    )


def test_the_papers_radius_is_refused_where_it_is_too_large():
    assert said(BOUND)["eps"] == (
        "b allows eps = 0.013 at most, the paper's 0.15 not: a target that settles on one of 4 responses leaves the "
        "others at 0, and the ball moves weight there; at 0.15 it brings a win rate of 1 down to 0.19."
    )
    assert "eps" not in said({**BOUND, "largest_eps": 0.2})


def test_gains_are_explained_where_they_are_shown():
    gaining = {"objective": "c", "primary": [0.8, 0.8124, 0.79]}
    assert "by up to 0.012" in said(row("c", 0.6), sweeps=[gaining])["gain"]
    assert "gain" not in said(BOUND, row("c", 0.6), sweeps=[gaining])  # the list shows b alone
    assert "gain" not in said(row("c", 0.6), sweeps=[{"objective": "c", "primary": [0.8, 0.8004]}])


@pytest.mark.parametrize(("value", "text"), [(0.01379, "0.013"), (0.1, "0.1"), (0, "0"), (6.19e-5, "6.1e-05")])
def test_two_digits_are_rounded_down(value, text):
    assert two_digits(value) == text
