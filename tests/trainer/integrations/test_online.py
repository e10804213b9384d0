"""What is measured on the policy's own samples, and that the multipliers it moves solve the constrained problem."""

import math

import pytest
import torch

from mopo_kernels import InfeasibleThresholds, solve_tabular
from mopo_trainer.integrations.online import MeasuredDual, mean_win_rates, measured_win_rates, wins, without_gaps

NAN = math.nan


def test_win_rates_count_the_opponents_of_the_prompt():
    rewards = torch.tensor([[1.0], [2.0], [5.0], [5.0]])
    opponents = torch.tensor([[1.0], [3.0], [9.0], [5.0]])
    assert measured_win_rates(rewards, opponents, 2)[:, 0].tolist() == [0.25, 0.5, 0.25, 0.25]
    assert wins(2.0, [1.0, 3.0]) == 0.5
    soft = measured_win_rates(rewards, opponents, 2, rating_scale=2.0)
    assert soft[0, 0] == pytest.approx((0.5 + 1 / (1 + math.e)) / 2)


def test_a_monotone_change_of_a_reward_changes_nothing():
    rewards, opponents = torch.randn(12, 2), torch.randn(12, 2)
    changed = [x.exp() * 7 - 3 for x in (rewards, opponents)]
    assert torch.equal(measured_win_rates(rewards, opponents, 4), measured_win_rates(*changed, 4))


def test_against_itself_every_policy_wins_one_half():
    """Why opponents come from elsewhere: no threshold could bind."""
    rewards = torch.randn(12, 1)
    assert mean_win_rates(measured_win_rates(rewards, rewards, 6), torch.arange(12) // 6).item() == pytest.approx(0.5)


def test_what_is_not_scored_takes_no_side():
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [3.0, 1.0], [NAN, 1.0]])
    opponents = torch.tensor([[0.0, 1.0], [2.0, 1.0], [NAN, NAN], [NAN, 1.0]])
    win_rate = measured_win_rates(rewards, opponents, 2)
    torch.testing.assert_close(
        win_rate, torch.tensor([[0.5, NAN], [NAN, NAN], [NAN, 0.5], [NAN, 0.5]]).double(), equal_nan=True
    )
    group = torch.tensor([7, 7, 3, 3])
    assert without_gaps(win_rate, group)[:2, 0].tolist() == [0.5, 0.5]
    assert mean_win_rates(win_rate, group).tolist() == [0.5, 0.5]
    assert without_gaps(win_rate[[2, 0, 3, 1]], group[[2, 0, 3, 1]])[3, 0] == 0.5  # in any order


def test_what_is_not_scored_moves_nothing():
    dual = MeasuredDual(["a", "b"], "a", {"b": 0.6}, multiplier_lr=0.5)
    dual.measure(torch.tensor([0.5, 0.4]))
    assert dual.multipliers.tolist() == pytest.approx([1, 0.1])
    dual.measure(torch.tensor([0.5, NAN]))
    assert dual.multipliers.tolist() == pytest.approx([1, 0.1])
    assert dual.metrics(torch.tensor([NAN, 0.25])) == pytest.approx(
        {"multiplier/a": 1, "win_rate/b": 0.25, "multiplier/b": 0.1, "threshold/b": 0.6, "slack/b": -0.35}
    )


def test_names_and_thresholds_are_checked():
    with pytest.raises(ValueError, match="primary must be one of the objectives a, b; got 'c'"):
        MeasuredDual(["a", "b"], "c", {}, 0.1)
    with pytest.raises(ValueError, match="thresholds: 'c' is not one of the objectives"):
        MeasuredDual(["a", "b"], "a", {"c": 0.5}, 0.1)
    with pytest.raises(InfeasibleThresholds, match=r"'b' must reach 1\.5, but at most 1 is attainable"):
        MeasuredDual(["a", "b"], "a", {"b": 1.5}, 0.1)


def test_sampled_advantages_and_measured_multipliers_solve_the_constrained_problem():
    """Policy gradient with s = Σ λ v on samples of a softmax policy, measured multipliers: solve_tabular's answer."""
    torch.manual_seed(0)
    size, samples, tau, threshold = 6, 64, 0.3, 0.55
    rewards = torch.stack([torch.arange(size), torch.tensor([3, 5, 4, 1, 2, 0])], 1).double()  # they conflict
    uniform = torch.full((size,), 1 / size, dtype=torch.float64)
    preference = ((rewards.T[:, :, None] - rewards.T[:, None]).sign() + 1) / 2
    expected = solve_tabular(preference, uniform, uniform, [threshold], tau=tau)
    assert expected.multipliers[1] > 0.3

    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    dual = MeasuredDual(["a", "b"], "a", {"b": threshold}, multiplier_lr=0.05)
    policies, multipliers = [], []
    for step in range(1000):
        policy = logits.softmax(0)
        drawn = torch.multinomial(policy.detach(), samples, replacement=True)
        opponents = torch.multinomial(uniform, samples, replacement=True)
        win_rate = measured_win_rates(rewards[drawn], rewards[opponents], samples)
        score = win_rate @ dual.multipliers
        dual.measure(mean_win_rates(win_rate, torch.zeros(samples, dtype=int)))
        kl = (policy * (policy / uniform).log()).sum()
        loss = -((score - score.mean()) * policy.log()[drawn]).mean() + tau * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 400:
            policies.append(policy.detach())
            multipliers.append(dual.multipliers[1].clone())
    torch.testing.assert_close(torch.stack(policies).mean(0), expected.policy, atol=0.02, rtol=0)
    assert torch.stack(multipliers).mean() == pytest.approx(expected.multipliers[1].item(), rel=0.1)
