"""Rank correlations against scipy, win rates per prompt by hand, intervals with their fixed seed."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mopo_trainer.report import evaluate
from mopo_trainer.report.evaluate import bootstrap_interval
from mopo_trainer.report.evidence import (
    against_fresh_texts,
    are_sure,
    intervals_over_prompts,
    prompt_win_rates,
    rank_correlations,
    within_group,
)

NAN = math.nan


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_rank_correlations_are_scipys_over_what_both_label():
    win_rate = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    win_rate[:, 1] = (win_rate[:, 0] ** 3 - 0.3 * win_rate[:, 1]).round(decimals=1)  # with ties
    win_rate[:20, 2] = NAN
    found = rank_correlations(win_rate)
    for i in range(3):
        for j in range(3):
            both = ~(win_rate[:, i].isnan() | win_rate[:, j].isnan())
            expected = spearmanr(win_rate[both, i], win_rate[both, j]).statistic
            assert found[i][j] == pytest.approx(expected, abs=1e-12)
    assert found[0][1] > 0.5


def test_a_constant_objective_has_no_rank():
    assert rank_correlations(tensor([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5]]))[0] == [pytest.approx(1), None]


def test_win_rates_per_prompt_by_hand():
    """Weights ¾ and ¼ (tau ln 3 between the scores); an unlabelled response counts ½, an unlabelled group nothing."""
    tau = 1 / math.log(3)
    win_rate = tensor([[1.0, 0.2], [0.0, NAN], [0.0, NAN], [1.0, NAN]])
    rates = prompt_win_rates(win_rate, torch.tensor([9, 9, 4, 4]), tensor([1.0, 0.0]), tau)
    expected = tensor([[0.75, NAN], [0.75, 0.75 * 0.2 + 0.25 * 0.5]])  # groups in the order of their ids
    torch.testing.assert_close(rates, expected, equal_nan=True)


def test_intervals_leave_out_prompts_without_labels():
    rates = tensor([[0.0, NAN], [1.0, 0.5], [1.0, 0.5], [0.0, NAN]])
    first, second = intervals_over_prompts(rates)
    assert first == bootstrap_interval([0, 1, 1, 0], resamples=2000)
    # of four tosses 1/16 are all 0 and 1/16 all 1: both beyond 2.5%
    assert first == (0.5, 0.0, 1.0)
    assert second == (0.5, 0.5, 0.5)


def test_blocks_of_draws_change_no_interval(monkeypatch):
    values = np.random.default_rng(3).random(50)
    whole = bootstrap_interval(values, resamples=500)
    monkeypatch.setattr(evaluate, "MAX_BLOCK", 1000)
    assert bootstrap_interval(values, resamples=500) == whole


@pytest.mark.parametrize("size", [2, 3, 8])
def test_who_wins_in_a_group_wins_less_against_a_new_text(size):
    """Ranks of uniform draws: the best of n beats a new one with probability n/(n + 1)."""
    draws = torch.rand(200_000, size + 1, generator=torch.Generator().manual_seed(0)).double()
    group, new = draws[:, :size], draws[:, size]
    wins = (group[:, :1] > group[:, 1:]).sum(1)
    for k in range(size):
        measured = (group[:, 0] > new)[wins == k].double().mean().item()
        assert against_fresh_texts(k / (size - 1), size) == pytest.approx(measured, abs=0.012)
        assert within_group(against_fresh_texts(k / (size - 1), size), size) == pytest.approx(k / (size - 1))


def test_sure_labels_are_told_from_shares_and_ties():
    group = torch.arange(40) // 4
    ranks = torch.tensor([0, 1 / 3, 2 / 3, 1]).double().repeat(10)
    assert are_sure(ranks, group)
    assert are_sure(ranks.masked_fill(group == 3, torch.nan), group)
    assert not are_sure(torch.full_like(ranks, 0.5), group)  # of 1.5 wins each
    assert not are_sure(0.9 * ranks + 0.05, group)
