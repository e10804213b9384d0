"""The exact finite solver against golden cases and first principles."""

import math

import pytest
import torch
from golden_cases import golden, tensor

from mopo_kernels.objective.dual import InfeasibleThresholds
from mopo_kernels.objective.tabular import solve_tabular


def problem(seed=0, objectives=3, responses=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(objectives, responses, responses, generator=generator, dtype=torch.float64)
    mu, pi_ref = torch.rand(2, responses, generator=generator, dtype=torch.float64).log().softmax(1)
    return (logits - logits.mT).sigmoid(), mu, pi_ref


@pytest.mark.parametrize("case", golden("tabular"))
def test_golden(case):
    solution = solve_tabular(
        tensor(case["P"]),
        tensor(case["mu"]),
        tensor(case["pi_ref"]),
        case["thresholds"],
        tau=case["tau"],
        primary=case["primary"],
    )
    tol = case["tol"]
    torch.testing.assert_close(solution.policy, tensor(case["policy"]), rtol=0, atol=tol["policy"])
    torch.testing.assert_close(solution.win_rates, tensor(case["win_rates"]), rtol=0, atol=tol["value"])
    assert solution.value == pytest.approx(case["value"], abs=tol["value"])
    assert solution.multipliers[case["primary"]] == 1
    if case["multipliers"] is not None:
        secondary = torch.arange(len(case["win_rates"])) != case["primary"]
        torch.testing.assert_close(
            solution.multipliers[secondary], tensor(case["multipliers"]), rtol=0, atol=tol["multipliers"]
        )


@pytest.mark.parametrize("primary", [0, 1, 2])
def test_no_policy_nearby_is_feasible_and_better(primary):
    preference, mu, pi_ref = problem()
    values = preference @ mu
    secondary = [k for k in range(3) if k != primary]
    free = solve_tabular(preference, mu, pi_ref, [-math.inf] * 2, tau=0.1, primary=primary)
    thresholds = (free.win_rates + 0.3 * (values.amax(1) - free.win_rates))[secondary]
    solution = solve_tabular(preference, mu, pi_ref, [thresholds[0], -math.inf], tau=0.1, primary=primary)

    def value(policy):
        return values[primary] @ policy - 0.1 * (policy * (policy / pi_ref).log()).sum()

    assert solution.value == pytest.approx(value(solution.policy).item(), abs=1e-12)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    policies = (solution.policy.log() + 0.05 * noise).softmax(1)
    feasible = policies[policies @ values[secondary[0]] >= thresholds[0]]
    assert len(feasible) > 1000
    assert max(value(policy).item() for policy in feasible[:2000]) <= solution.value + 1e-9


def test_a_response_outside_the_reference_stays_outside():
    preference, mu, pi_ref = problem()
    pi_ref[0] = 0
    pi_ref /= pi_ref.sum()
    free = solve_tabular(preference, mu, pi_ref, [-math.inf, -math.inf], tau=0.1)
    inside = [1, 2, 3, 4]
    expected = ((preference[0] @ mu)[inside] / 0.1 + pi_ref[inside].log()).softmax(0)
    assert free.policy[0] == 0
    torch.testing.assert_close(free.policy[inside], expected)
    bound = solve_tabular(preference, mu, pi_ref, [float(free.win_rates[1]) + 0.02, -math.inf], tau=0.1)
    assert bound.policy[0] == 0
    assert bound.multipliers[1] > 0
    assert bound.value < free.value


def test_infeasible_thresholds_name_the_best_attainable():
    preference, mu, pi_ref = problem()
    best = (preference @ mu)[2].max().item()
    with pytest.raises(InfeasibleThresholds) as error:
        solve_tabular(preference, mu, pi_ref, [-math.inf, best + 0.01], tau=0.1)
    assert error.value.objective == 2
    assert error.value.threshold == pytest.approx(best + 0.01)
    assert error.value.attainable == pytest.approx(best)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.full((2, 3, 3), 0.5), "preference must be .objectives, responses, responses. for mu's 2 responses"),
        (0, torch.full((2, 2, 2), 0.6), "must be 1"),
        (0, torch.tensor([[[0.5, 2.0], [-1.0, 0.5]]]), r"preference must lie in \[0, 1\]"),
        (1, torch.tensor([0.5, 0.6]), "mu must be a distribution"),
        (2, torch.tensor([1.5, -0.5]), "pi_ref must be a distribution"),
        (3, [0.5, 0.5], "thresholds must have one entry for each of the 1 secondary"),
        (4, -1.0, "tau must be a positive number"),
    ],
)
def test_bad_arguments_are_named(position, value, message):
    arguments = [torch.full((2, 2, 2), 0.5), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]), [0.5], 0.1]
    arguments[position] = value
    *positional, tau = arguments
    with pytest.raises(ValueError, match=message):
        solve_tabular(*positional, tau=tau)
