"""The exact dual solver against scipy: ragged, unlabelled, lagged and collapsed labels, with and without a ball."""

import math

import numpy as np
import pytest
import torch
from golden_cases import tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from label_data import TAU, Oracle, between, data, solve
from scipy.optimize import least_squares, linprog, minimize, minimize_scalar

from mopo_kernels import mopo_objective, win_rate_from_pairs
from mopo_kernels.objective.dual import InfeasibleThresholds, attainable_range, auto_eps, largest_eps, solve_dual
from mopo_kernels.objective.robust import robust_bound

RESIDUAL = 1e-8  # what solve_dual promises
NEWTON_STEPS = 10  # quadratic convergence takes 3 to 8 here; a wrong derivative three times as many


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"sizes": (2,)}, id="pairs"),
        pytest.param({"sizes": (2,), "hard": True, "groups": 200}, id="hard pairs, collapsed"),
        pytest.param(
            {"sizes": (2,), "hard": True, "groups": 200, "lag": True}, id="hard pairs, none alike for their lag"
        ),
        pytest.param({}, id="ragged"),
        pytest.param({"unlabelled": 0.3}, id="unlabelled"),
        pytest.param({"lag": True}, id="lag"),
        pytest.param({"unlabelled": 0.3, "lag": True, "hard": True, "objectives": 4}, id="everything"),
    ],
)


# -------------------------------------------------------------------------------------------------------- solve_dual


@KINDS
@pytest.mark.parametrize("primary", [0, 1])
def test_multipliers_are_those_of_a_generic_solver(kind, primary):
    labels = data(**kind)
    thresholds = between(labels, 0.3, primary=primary)
    solution = solve(labels, thresholds, primary=primary)
    oracle = Oracle(*labels, primary)
    reference = minimize(
        oracle.dual,
        np.ones(len(thresholds)),
        args=(thresholds.numpy(),),
        bounds=[(0, None)] * len(thresholds),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    multipliers = solution.multipliers[oracle.secondary].numpy()
    assert solution.multipliers[primary] == 1
    assert (multipliers > 1e-3).any(), "no threshold binds: the case tests nothing"
    np.testing.assert_allclose(multipliers, reference.x, atol=1e-4)  # scipy's accuracy with numerical gradients
    assert solution.value == pytest.approx(reference.fun, abs=1e-9)
    assert solution.iterations <= NEWTON_STEPS

    win_rates = oracle.win_rates(multipliers)
    np.testing.assert_allclose(solution.win_rates, win_rates, atol=1e-12)
    slack = win_rates[oracle.secondary] - thresholds.numpy()
    assert np.abs(np.minimum(multipliers, slack)).max() <= RESIDUAL
    torch.testing.assert_close(solution.lower_bounds, solution.win_rates, rtol=0, atol=1e-12)


@KINDS
@pytest.mark.parametrize("eps", [1e-4, 0.01])
def test_robust_multipliers_are_those_of_a_generic_solver(kind, eps):
    labels = data(**kind)
    thresholds = between(labels, 0.25, eps=eps)
    solution = solve(labels, thresholds, eps=eps)
    oracle = Oracle(*labels)
    multipliers = solution.multipliers[1:].numpy()
    assert (multipliers > 1e-3).any(), "no threshold binds: the case tests nothing"

    lower_bounds = oracle.lower_bounds(multipliers, eps)
    np.testing.assert_allclose(solution.lower_bounds[1:], lower_bounds, atol=1e-9)
    assert np.abs(np.minimum(multipliers, lower_bounds - thresholds.numpy())).max() <= RESIDUAL
    assert solution.iterations - solve(labels, thresholds).iterations <= NEWTON_STEPS

    def fischer_burmeister(free):
        slack = oracle.lower_bounds(np.abs(free), eps) - thresholds.numpy()
        return np.abs(free) + slack - np.hypot(free, slack)

    start = solve(labels, thresholds).multipliers[1:].numpy()
    reference = least_squares(fischer_burmeister, start, xtol=1e-12, ftol=1e-14, gtol=1e-14)
    np.testing.assert_allclose(multipliers, np.abs(reference.x), atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_what_the_objective_reports_at_the_solution(eps):
    labels = data(unlabelled=0.2, lag=True)
    solution = solve(labels, between(labels, 0.2, eps=eps), eps=eps)
    output = mopo_objective(
        torch.zeros_like(labels[2]),
        labels[0],
        labels[1],
        solution.multipliers,
        tau=TAU,
        eps=eps,
        lag_log_ratio=labels[2],
    )
    torch.testing.assert_close(output.win_rates, solution.win_rates, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.lower_bounds, solution.lower_bounds, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.chi, solution.chi, rtol=1e-6, atol=0)
    labelled = (~labels[0][:, 0].isnan()).double()
    size = (labels[1][:, None] == labels[1]).sum(1)
    coverage = (labelled / size).sum() / labels[1].unique().numel()
    assert solution.value == pytest.approx(float(coverage * output.win_rates[0] - TAU * output.kl), abs=1e-10)


@given(seed=st.integers(0, 10**6), fraction=st.floats(0.05, 0.9), eps=st.sampled_from([0.0, 1e-6, 1e-3, 0.05]))
@settings(deadline=None, max_examples=12)
def test_conditions_hold_or_the_thresholds_are_infeasible(seed, fraction, eps):
    """Whatever the data: either the optimality conditions hold, or the error names a threshold above its best."""
    labels = data(seed=seed, groups=12, objectives=2 + seed % 3, unlabelled=0.1, lag=bool(seed % 2), hard=seed % 5 == 0)
    if labels[0].isnan().all(0).any():
        return
    thresholds = between(labels, fraction, eps=eps)
    solution, error = None, None
    try:
        solution = solve(labels, thresholds, eps=eps)
    except InfeasibleThresholds as infeasible:
        error = infeasible
    if solution is not None:
        slack = solution.lower_bounds[1:] - thresholds
        assert torch.minimum(solution.multipliers[1:], slack).abs().max() <= RESIDUAL
    if error is not None:
        assert error.threshold > error.attainable - 1e-6
        assert error.threshold == pytest.approx(float(thresholds[error.objective - 1]))
        assert len(thresholds) > 1, "alone, every one of them is attainable"


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_identical_groups_count_as_often_as_they_stand_there(eps):
    """Collapsing identical groups must not change a thing: copies of a few groups, against the few with weights."""
    labels = data(groups=6, sizes=(2, 3), objectives=2)
    repeats = [3, 1, 4, 2, 5, 300]
    rows = torch.cat(
        [(labels[1] == i).nonzero()[:, 0].repeat(n) for i, n in zip(labels[1].unique(), repeats, strict=True)]
    )
    group, start = [], 0
    for i, n in zip(labels[1].unique(), repeats, strict=True):
        size = int((labels[1] == i).sum())
        group.append(start + torch.arange(n).repeat_interleave(size))
        start += n
    copied = labels[0][rows], torch.cat(group), None
    thresholds = between(copied, 0.3, eps=eps)
    noise = 1e-13 * torch.rand(copied[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distinct = copied[0] * (1 - noise), copied[1], None  # no two groups alike
    torch.testing.assert_close(
        solve(copied, thresholds, eps=eps).multipliers,
        solve(distinct, thresholds, eps=eps).multipliers,
        rtol=0,
        atol=1e-7,
    )


def test_groups_that_the_projection_confuses_are_kept_apart(monkeypatch):
    labels = data(sizes=(2,), hard=True, groups=200)
    expected = solve(labels, [0.5, 0.5]).multipliers
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.zeros(*size, dtype=dtype))
    torch.testing.assert_close(solve(labels, [0.5, 0.5]).multipliers, expected)


def test_a_group_labelled_zero_is_not_taken_for_an_unlabelled_one():
    hard = win_rate_from_pairs(tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 5))
    zero, unlabelled = hard.clone(), hard.clone()
    zero[[0, 11, 1, 12], 1] = tensor([0.0, 0.0, 0.0, 0.0])
    unlabelled[[0, 11, 1, 12], 1] = tensor([None, None, 0.0, 0.0])
    group = torch.arange(11).repeat(2)
    for labels in (zero, unlabelled):
        expected = Oracle(labels, group, None).win_rates([0.0])
        np.testing.assert_allclose(solve_dual(labels, group, [-math.inf], tau=TAU).win_rates, expected, atol=1e-12)


def test_labels_that_nearly_repeat_each_other():
    """Five hard pairs and five objectives: which multipliers rest at zero cannot be told from one step's signs."""
    labels = data(seed=1239, groups=5, sizes=(2,), objectives=5, hard=True, lag=True, unlabelled=0.1)
    thresholds = tensor([0.158606756238, 0.909010367458, 0.265891711678, 0.363390308492])
    solution = solve(labels, thresholds)
    slack = solution.win_rates[1:] - thresholds
    assert torch.minimum(solution.multipliers[1:], slack).abs().max() <= RESIDUAL


def test_no_threshold_is_no_constraint():
    labels = data()
    free = solve(labels, [-math.inf, -math.inf])
    assert free.multipliers.tolist() == [1, 0, 0]
    assert free.iterations == 0
    one = solve(labels, [float(free.win_rates[1]) + 0.1, -math.inf])
    assert one.multipliers[1] > 0
    assert one.multipliers[2] == 0
    slack = solve(labels, [float(free.win_rates[1]) - 0.1, 0.0])
    assert slack.multipliers.tolist() == [1, 0, 0]
    torch.testing.assert_close(solve_dual(labels[0][:, :1], labels[1], [], tau=TAU).win_rates, free.win_rates[:1])


def test_two_copies_of_an_objective_share_its_multiplier():
    win_rate, group, _ = data(objectives=2)
    twice = torch.cat([win_rate, win_rate[:, 1:]], 1)
    threshold = float(between((win_rate, group, None), 0.4)[0])
    alone = solve_dual(win_rate, group, [threshold], tau=TAU)
    shared = solve_dual(twice, group, [threshold, threshold], tau=TAU)
    assert shared.multipliers[1:].sum().item() == pytest.approx(alone.multipliers[1].item(), abs=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-9, 1e-6, 1e-4])
def test_tight_thresholds_are_not_called_infeasible(distance):
    """The best attainable value itself is reached in the limit of large multipliers, and within 1e-8 before it."""
    win_rate, group, _ = data(hard=True)
    best = attainable_range(win_rate, group, tau=TAU)[1]
    thresholds = [float(best[1]) - distance, -math.inf]
    solution = solve_dual(win_rate, group, thresholds, tau=TAU)
    assert solution.win_rates[1] >= thresholds[0] - RESIDUAL


def test_a_threshold_nobody_reaches_alone():
    win_rate, group, _ = data(unlabelled=0.2)
    best = np.mean([win_rate[group == i, 2].max() for i in group.unique() if not win_rate[group == i, 2].isnan().any()])
    with pytest.raises(InfeasibleThresholds) as error:
        solve_dual(win_rate, group, [0.1, float(best) + 0.01], tau=TAU)
    assert error.value.objective == 2
    assert error.value.threshold == pytest.approx(best + 0.01)
    assert error.value.attainable == pytest.approx(best)
    assert f"objective 2 must reach {best + 0.01:.6g}, but at most {best:.6g} is attainable" in str(error.value)


def test_a_threshold_nobody_reaches_is_compared_with_the_bound_where_there_is_a_ball():
    labels = data(groups=10)
    _, best = attainable_range(labels[0], labels[1], tau=TAU, eps=0.02)
    with pytest.raises(InfeasibleThresholds) as error:
        solve(labels, [-math.inf, 0.99], eps=0.02)
    assert error.value.attainable == pytest.approx(float(best[2]))


def best_beside(win_rate, group, objective, others):
    """The largest win rate of one objective under thresholds {objective: value} of others, by linear programming."""
    members = [group == i for i in group.unique()]
    reference = linprog(
        -win_rate[:, objective].numpy() / len(members),
        A_ub=[-win_rate[:, other].numpy() / len(members) for other in others],
        b_ub=[-threshold for threshold in others.values()],
        A_eq=np.stack([m.double().numpy() for m in members]),
        b_eq=np.ones(len(members)),
    )
    return -reference.fun


@pytest.mark.parametrize("max_multiplier", [1e4, 1e200])  # 1e200: proven by weak duality, long before it is reached
def test_thresholds_that_exclude_each_other(max_multiplier):
    win_rate, group, _ = data()
    best = attainable_range(win_rate, group, tau=TAU)[1]
    thresholds = [float(best[1]) - 0.01, float(best[2]) - 0.01]
    with pytest.raises(InfeasibleThresholds) as error:
        solve_dual(win_rate, group, thresholds, tau=TAU, max_multiplier=max_multiplier)
    blamed = error.value.objective
    other = 3 - blamed
    assert error.value.threshold == thresholds[blamed - 1]
    attainable = best_beside(win_rate, group, blamed, {other: thresholds[other - 1]})
    assert error.value.attainable == pytest.approx(attainable, abs=1e-4)
    just_below = list(thresholds)
    just_below[blamed - 1] = attainable - 1e-4
    solution = solve_dual(win_rate, group, just_below, tau=TAU)
    assert (solution.win_rates[1:] >= tensor(just_below) - RESIDUAL).all()


def test_of_three_thresholds_that_exclude_each_other_the_blamed_one_fails_beside_one_that_holds():
    win_rate, group, _ = data(objectives=4)
    best = attainable_range(win_rate, group, tau=TAU)[1]
    thresholds = (best[1:] - 0.01).tolist()
    with pytest.raises(InfeasibleThresholds) as error:
        solve_dual(win_rate, group, thresholds, tau=TAU)
    blamed = error.value.objective
    beside = [
        best_beside(win_rate, group, blamed, {other: thresholds[other - 1]}) for other in (1, 2, 3) if other != blamed
    ]
    assert min(abs(error.value.attainable - value) for value in beside) < 1e-4


def first_that_reaches(oracle, threshold, eps):
    """The smallest multiplier whose bound is that high, to 1e-3."""
    end = next(m for m in np.arange(0, 20, 0.02) if oracle.lower_bounds([m], eps)[0] >= threshold)
    return next(m for m in np.arange(end - 0.02, end + 1e-3, 1e-3) if oracle.lower_bounds([m], eps)[0] >= threshold)


def test_a_bound_that_nobody_reaches():
    """With a ball, LB falls again once the policy has concentrated: the best one is in between."""
    labels = data(objectives=2)
    eps = 0.02
    oracle = Oracle(*labels)
    peak = minimize_scalar(lambda m: -oracle.lower_bounds([m], eps)[0], bounds=(1e-2, 50), method="bounded")
    best = -peak.fun
    assert best > oracle.lower_bounds([50.0], eps)[0] + 0.01
    _, attainable = attainable_range(labels[0], labels[1], tau=TAU, eps=eps)
    assert float(attainable[1]) == pytest.approx(best, abs=1e-5)
    with pytest.raises(InfeasibleThresholds) as error:
        solve(labels, [best + 0.005], eps=eps)
    assert error.value.attainable == pytest.approx(best, abs=1e-4)
    solution = solve(labels, [best - 1e-4], eps=eps)
    first = first_that_reaches(oracle, best - 1e-4, eps)
    assert solution.multipliers[1].item() == pytest.approx(first, abs=1e-3), "the smaller of two solutions"


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        pytest.param(326, (2, 3, 5), id="Newton from the solution at eps 0 oversteps the peak, to 3.9"),
        pytest.param(104, (2,), id="the bound falls before it rises, so no path leads there"),
    ],
)
def test_of_two_robust_solutions_the_smaller_is_returned(seed, sizes):
    labels = data(seed=seed, groups=5, sizes=sizes, objectives=2)
    eps = 0.05
    threshold = float(between(labels, 0.9, eps=eps)[0])
    oracle = Oracle(*labels)
    first = first_that_reaches(oracle, threshold, eps)
    assert solve(labels, [threshold], eps=eps).multipliers[1].item() == pytest.approx(first, abs=1e-3)


def test_attainable_range_runs_from_the_free_to_the_best_value():
    labels = data(unlabelled=0.2, lag=True)
    free, best = attainable_range(labels[0], labels[1], tau=TAU, lag_log_ratio=labels[2])
    torch.testing.assert_close(free, solve(labels, [-math.inf, -math.inf]).win_rates)
    oracle = Oracle(*labels)
    highest = np.array([v.max(0) for v in oracle.values])
    np.testing.assert_allclose(best, (highest * oracle.labelled).sum(0) / oracle.labelled.sum(0))


def bad(name, value, message):
    return pytest.param({name: value}, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad("win_rate", tensor([[0.5, 0.5], [0.5, 1.5]]), r"win_rate must lie in \[0, 1\]"),
        bad("win_rate", tensor([[0.5, None], [0.5, None]]), "win_rate has no label for objective 1"),
        bad("group", torch.tensor([0, 1]), "group 0 has one response"),
        bad("group", torch.tensor([0]), "group must be an int64 tensor"),
        bad("thresholds", [0.5, 0.5], "thresholds must have one entry for each of the 1 secondary objectives"),
        bad("thresholds", [math.nan], "thresholds must be numbers below inf"),
        bad("thresholds", [math.inf], "thresholds must be numbers below inf"),
        bad("tau", 0.0, "tau must be a positive number"),
        bad("eps", -1.0, "eps must be a number >= 0"),
        bad("primary", 2, "primary must be an objective 0 .. 1; got 2"),
        bad("primary", -1, "primary must be an objective 0 .. 1; got -1"),
        bad("lag_log_ratio", torch.tensor([0.0, math.inf]), "lag_log_ratio must be finite"),
        bad("max_multiplier", 0.0, "max_multiplier must be a positive number"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "win_rate": tensor([[0.0, 1.0], [1.0, 0.0]]),
        "group": torch.tensor([0, 0]),
        "thresholds": [0.5],
        "tau": TAU,
    }
    solve_dual(**good)
    with pytest.raises(ValueError, match=message):
        solve_dual(**{**good, **change})


# ----------------------------------------------------------------------------------------------------------- auto eps


@pytest.mark.parametrize("beta", [0.9, 0.9995])
def test_auto_eps_costs_what_the_ratchet_leaves(beta):
    labels = data(unlabelled=0.2, lag=True, objectives=4)
    eps = auto_eps(labels[0], labels[1], beta=beta, lag_log_ratio=labels[2])
    oracle = Oracle(*labels)
    costs = []
    for k in oracle.secondary:
        pairs = zip(oracle.values, oracle.reference, oracle.labelled, strict=True)
        sample = [(v[:, k], r) for v, r, labelled in pairs if labelled[k]]
        values = torch.from_numpy(np.concatenate([v for v, _ in sample]))
        ref_weights = torch.from_numpy(np.concatenate([r for _, r in sample]) / len(sample))
        mean = (values * ref_weights).sum()
        costs.append((mean.item(), (mean - robust_bound(values, ref_weights, eps)[0]).item()))
    slack = (1 - beta) * min(mean for mean, _ in costs)
    assert max(cost for _, cost in costs) == pytest.approx(slack, rel=1e-6)


def test_auto_eps_by_hand_and_where_no_ball_costs_anything():
    pairs = win_rate_from_pairs(torch.ones(8, 2, dtype=torch.float64))
    group = torch.arange(8).repeat(2)
    eps = auto_eps(pairs, group, beta=0.9995)
    q = 0.5 - 0.0005 * 0.5  # the tilted mean of a fair coin
    assert eps == pytest.approx(q * math.log(2 * q) + (1 - q) * math.log(2 - 2 * q), rel=1e-6)
    assert auto_eps(pairs, group, beta=1.0) == 0
    assert auto_eps(torch.full_like(pairs, 0.5), group, beta=0.9) == 0
    assert auto_eps(pairs[:, :1], group, beta=0.9) == 0


def test_largest_eps_by_hand():
    """Eight fair pairs, one objective held: a target of weight w has the values 2w and 0, half each; w = 1 is best."""
    pairs = win_rate_from_pairs(torch.tensor([[1.0, 1.0]], dtype=torch.float64).expand(8, 2))
    group = torch.arange(8).repeat(2)
    q = 0.6 / 2  # the mass that the ball leaves on the value 2
    by_hand = q * math.log(2 * q) + (1 - q) * math.log(2 - 2 * q)
    assert largest_eps(pairs, group, [0.6], tau=TAU).tolist() == [math.inf, pytest.approx(by_hand, rel=1e-6)]
    assert largest_eps(torch.full_like(pairs, 0.5), group, [0.6], tau=TAU)[1] == 0
    assert largest_eps(torch.full_like(pairs, 0.5), group, [0.4], tau=TAU)[1] == math.inf
    assert largest_eps(pairs, group, [-math.inf], tau=TAU)[1] == math.inf


def test_beyond_the_largest_eps_a_threshold_alone_is_infeasible():
    win_rate, group, _ = data(unlabelled=0.2, lag=False, objectives=2)
    eps = float(largest_eps(win_rate, group, [0.6], tau=TAU)[1])
    assert 0 < eps < math.inf
    solve_dual(win_rate, group, [0.6], tau=TAU, eps=0.99 * eps)
    with pytest.raises(InfeasibleThresholds):
        solve_dual(win_rate, group, [0.6], tau=TAU, eps=1.01 * eps)
