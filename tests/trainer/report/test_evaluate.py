"""Held-out measurements: win rates from texts and from log-probs."""

import math

import numpy as np
import pytest
import torch

from mopo_trainer.report.evaluate import bootstrap_interval, label_win_rates, sampled_win_rates

NAN = math.nan


def length(prompt, response):
    return float(len(response))


def test_sampled_win_rates_compare_all_pairs_and_count_ties_half():
    ours = [["aaa", "a"], ["a"]]
    base = [["aa", "aaa"], ["aaaa"]]
    # first prompt: aaa beats aa, ties aaa; a loses twice -> (1 + ½ + 0 + 0) / 4; second prompt: lost
    found = sampled_win_rates(["p", "q"], ours, base, {"length": length})
    np.testing.assert_allclose(found["length"], [1.5 / 4, 0.0])


def test_sampled_win_rates_of_equal_models_are_half():
    texts = [["a", "bb", "ccc"], ["dddd", "e"]]
    np.testing.assert_allclose(sampled_win_rates(["p", "q"], texts, texts, {"length": length})["length"], 0.5)


def test_sampled_win_rates_show_the_prompt_to_the_scorer():
    found = sampled_win_rates(["yes", "no"], [["no"]] * 2, [["yes"]] * 2, {"echo": lambda p, r: float(p == r)})
    np.testing.assert_allclose(found["echo"], [0.0, 1.0])


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    interval = bootstrap_interval([*values, NAN])
    half_width = 1.96 * values.std() / 20  # normal approximation, sqrt(400) = 20
    assert interval.mean == pytest.approx(values.mean())
    # 10,000 resamples put a 2.5% quantile of a normal within 3 * sqrt(.025 * .975 / 10,000) / 0.0584 = 0.08 sigma
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.08 * values.std() / 20)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.08 * values.std() / 20)


def test_bootstrap_interval_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="nothing is labelled"):
        bootstrap_interval([NAN, NAN])


def test_label_win_rates_follow_the_formula():
    h = torch.tensor([0.0, math.log(3.0), math.log(2.0), 0.0, 0.0])
    win_rate = torch.tensor([[1.0, 0.2], [0.0, 0.6], [1.0, NAN], [0.0, NAN], [0.5, NAN]])
    group = torch.tensor([7, 7, 3, 3, 3])
    reference = torch.tensor([-40.0, -3.0, -1.0, -2.0, -9.0])
    found = label_win_rates(reference + h, reference, win_rate, group, ["a", "b"])
    # weights: group 7 (1/4, 3/4), group 3 (1/2, 1/4, 1/4)
    assert found["a"]["win_rate"].mean == pytest.approx((0.25 + 0.625) / 2, abs=1e-6)
    assert found["a"]["reference"] == pytest.approx(0.5)
    assert found["b"]["win_rate"].mean == pytest.approx(0.25 * 0.2 + 0.75 * 0.6, abs=1e-6)
    assert found["b"]["groups"] == 1
    # a: the pair of group 7 is ordered wrongly; in group 3 two of three rightly, (3, 4) tie in h
    assert found["a"]["agreement"].mean == pytest.approx((0.0 + 2.5 / 3) / 2, abs=1e-6)
    assert found["b"]["agreement"].mean == 1.0


def test_reference_policy_reproduces_the_mean_label():
    logp = torch.randn(6, dtype=torch.float64)
    win_rate = torch.tensor([1.0, 0.0, 0.25, 0.75, 0.5, 0.5])[:, None]
    found = label_win_rates(logp, logp, win_rate, torch.tensor([0, 0, 1, 1, 2, 2]), ["a"])
    assert found["a"]["win_rate"].mean == pytest.approx(0.5)
    assert found["a"]["agreement"].mean == 0.5  # no order at all: every tie counts half; group 2 has no ordered pair


def test_unlabelled_response_of_a_labelled_group_counts_half():
    win_rate = torch.tensor([[1.0], [NAN]])
    logp = torch.tensor([0.0, math.log(3.0)])
    found = label_win_rates(logp, torch.zeros(2), win_rate, torch.tensor([0, 0]), ["a"])
    assert found["a"]["win_rate"].mean == pytest.approx(0.25 * 1.0 + 0.75 * 0.5)
    assert found["a"]["agreement"] is None


def test_huge_log_ratios_neither_overflow_nor_vanish():
    win_rate = torch.tensor([[1.0], [0.0]])
    found = label_win_rates(torch.tensor([2000.0, -3000.0]), torch.zeros(2), win_rate, torch.tensor([0, 0]), ["a"])
    assert found["a"]["win_rate"].mean == 1.0
