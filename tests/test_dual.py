"""The exact dual solver against scipy, and MOPODual: its three rules, lag, ratchet, and exact resumption."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_cases import golden, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, least_squares, linprog, minimize

from mopo_kernels.dual import (
    InfeasibleThresholds,
    MOPODual,
    attainable_range,
    auto_eps,
    barrier_multipliers,
    solve_dual,
)
from mopo_kernels.objective import mopo_objective, robust_bound, win_rate_from_pairs

TAU = 0.1
RESIDUAL = 1e-8  # what solve_dual promises


def data(seed=0, groups=30, sizes=(2, 3, 5, 8), objectives=3, unlabelled=0.0, lag=False, hard=False):
    """Conflicting labels of a data set: the secondaries lean against the primary."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(sizes)[torch.randint(len(sizes), (groups,), generator=generator)]
    count = int(size.sum())
    quality = torch.randn(count, objectives, generator=generator, dtype=torch.float64)
    quality[:, 1:] -= 0.5 * quality[:, :1]
    group = torch.arange(groups).repeat_interleave(size)
    win_rate = quality.sigmoid()
    if hard:
        beats = (quality[:, None] > quality[None]).double() * (group[:, None] == group[None])[..., None]
        win_rate = beats.sum(1) / (size[group][:, None] - 1)
    missing = torch.rand(groups, objectives, generator=generator) < unlabelled
    win_rate[missing[group]] = math.nan
    order = torch.randperm(count, generator=generator)
    lag_log_ratio = torch.randn(count, generator=generator, dtype=torch.float64) if lag else None
    return win_rate[order], group[order] * 7 - 50, lag_log_ratio


KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({"sizes": (2,)}, id="pairs"),
        pytest.param({"sizes": (2,), "hard": True, "groups": 200}, id="hard pairs, collapsed"),
        pytest.param({}, id="ragged"),
        pytest.param({"unlabelled": 0.3}, id="unlabelled"),
        pytest.param({"lag": True}, id="lag"),
        pytest.param({"unlabelled": 0.3, "lag": True, "hard": True, "objectives": 4}, id="everything"),
    ],
)


class Oracle:
    """The same quantities from their definitions, group by group in numpy."""

    def __init__(self, win_rate, group, lag_log_ratio, primary=0):
        win_rate, group = win_rate.numpy(), group.numpy()
        lag = np.zeros(len(group)) if lag_log_ratio is None else lag_log_ratio.numpy()
        self.members = [np.flatnonzero(group == i) for i in np.unique(group)]
        self.values = [
            np.nan_to_num(win_rate[m]) for m in self.members
        ]  # here groups are labelled in full or not at all
        self.labelled = np.array([~np.isnan(win_rate[m]).any(0) for m in self.members])
        self.reference = [np.exp(lag[m]) / np.exp(lag[m]).sum() for m in self.members]
        self.primary = primary
        self.secondary = [k for k in range(win_rate.shape[1]) if k != primary]

    def weights(self, multipliers):
        full = np.insert(np.asarray(multipliers, float), self.primary, 1.0)
        weights = []
        for v, r in zip(self.values, self.reference, strict=True):
            unnormalised = r * np.exp((v @ full - (v @ full).max()) / TAU)
            weights.append(unnormalised / unnormalised.sum())
        return weights

    def win_rates(self, multipliers):
        means = np.array([w @ v for w, v in zip(self.weights(multipliers), self.values, strict=True)])
        return (means * self.labelled).sum(0) / self.labelled.sum(0)

    def dual(self, multipliers, thresholds):
        full = np.insert(np.asarray(multipliers, float), self.primary, 1.0)
        log_z = [np.log(r @ np.exp(v @ full / TAU)) for v, r in zip(self.values, self.reference, strict=True)]
        return TAU * np.mean(log_z) - (multipliers * self.labelled.mean(0)[self.secondary]) @ thresholds

    def lower_bounds(self, multipliers, eps):
        """By bisection on the radius of each tilted distribution."""
        bounds = []
        for k in self.secondary:
            x, q0 = [], []
            for w, v, r, labelled in zip(
                self.weights(multipliers), self.values, self.reference, self.labelled, strict=True
            ):
                if labelled[k]:
                    x.append(w / r * v[:, k])
                    q0.append(r / self.labelled[:, k].sum())
            x, q0 = np.concatenate(x), np.concatenate(q0)

            def tilted(t, x=x, q0=q0):
                q = q0 * np.exp(-t * (x - x.min()))
                return q / q.sum()

            def radius(t, q0=q0, tilted=tilted):
                q = tilted(t)
                return (q[q > 0] * np.log(q[q > 0] / q0[q > 0])).sum() - eps

            bounds.append(x @ tilted(brentq(radius, 1e-9, 1e4, xtol=1e-14, rtol=1e-14)))
        return np.array(bounds)


def between(labels, fraction, *, eps=0.0, primary=0):
    """Thresholds some way from what is free to what each objective could get alone, hence a conflict."""
    free, best = attainable_range(labels[0], labels[1], tau=TAU, eps=eps, primary=primary, lag_log_ratio=labels[2])
    thresholds = free + fraction * (best - free)
    return torch.cat([thresholds[:primary], thresholds[primary + 1 :]])


def solve(labels, thresholds, **options):
    return solve_dual(labels[0], labels[1], thresholds, tau=TAU, lag_log_ratio=labels[2], **options)


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
@settings(deadline=None, max_examples=40)
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


def test_thresholds_that_exclude_each_other():
    win_rate, group, _ = data()
    best = attainable_range(win_rate, group, tau=TAU)[1]
    thresholds = [float(best[1]) - 0.01, float(best[2]) - 0.01]
    with pytest.raises(InfeasibleThresholds) as error:
        solve_dual(win_rate, group, thresholds, tau=TAU)
    blamed = error.value.objective
    other = 3 - blamed
    assert error.value.threshold == thresholds[blamed - 1]

    members = [group == i for i in group.unique()]
    one_policy_each = np.stack([m.double().numpy() for m in members])
    reference = linprog(
        -win_rate[:, blamed].numpy() / len(members),
        A_ub=-win_rate[None, :, other].numpy() / len(members),
        b_ub=[-thresholds[other - 1]],
        A_eq=one_policy_each,
        b_eq=np.ones(len(members)),
    )
    assert error.value.attainable == pytest.approx(-reference.fun, abs=1e-4)
    just_below = list(thresholds)
    just_below[blamed - 1] = -reference.fun - 1e-4
    solution = solve_dual(win_rate, group, just_below, tau=TAU)
    assert (solution.win_rates[1:] >= tensor(just_below) - RESIDUAL).all()


def test_a_bound_that_nobody_reaches():
    """With a ball, LB falls again once the policy has concentrated: the best one is in between."""
    labels = data(objectives=2)
    eps = 0.02
    oracle = Oracle(*labels)
    best = max(oracle.lower_bounds([m], eps)[0] for m in np.geomspace(1e-2, 1e2, 2000))
    assert best > oracle.lower_bounds([50.0], eps)[0] + 0.01
    _, attainable = attainable_range(labels[0], labels[1], tau=TAU, eps=eps)
    assert float(attainable[1]) == pytest.approx(best, abs=1e-5)
    with pytest.raises(InfeasibleThresholds) as error:
        solve(labels, [best + 0.005], eps=eps)
    assert error.value.attainable == pytest.approx(best, abs=1e-4)
    solution = solve(labels, [best - 1e-4], eps=eps)
    first = next(m for m in np.linspace(0, 20, 20001) if oracle.lower_bounds([m], eps)[0] >= best - 1e-4)
    assert solution.multipliers[1].item() == pytest.approx(first, abs=1e-3), "the smaller of two solutions"


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


# ------------------------------------------------------------------------------------------------- barrier, auto eps


@pytest.mark.parametrize("case", golden("barrier"))
def test_golden_barrier(case):
    multipliers = barrier_multipliers(tensor(case["slack"]), case["sigma"], case["delta"])
    torch.testing.assert_close(multipliers, tensor(case["multipliers"]), rtol=case["tol"]["rel"], atol=0)


def test_barrier_is_smooth_at_delta_and_zero_without_a_threshold():
    slack = tensor([0.1 - 1e-9, 0.1 + 1e-9, math.inf]).requires_grad_()
    multipliers = barrier_multipliers(slack, 0.3, 0.1)
    assert multipliers[2] == 0
    assert multipliers[0].item() == pytest.approx(multipliers[1].item(), rel=1e-7)
    gradient = torch.autograd.grad(multipliers[:2].sum(), slack)[0]
    assert gradient[0].item() == pytest.approx(gradient[1].item(), rel=1e-7)


def test_barrier_refuses_a_width_of_zero():
    with pytest.raises(ValueError, match="delta must be a positive number; got 0"):
        barrier_multipliers(tensor([0.1]), 0.1, 0.0)


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


# ----------------------------------------------------------------------------------------------------------- MOPODual

NAMES = ["help", "harmless", "short"]


def dual(thresholds=None, **options):
    options = {"primary": "help", "tau": TAU, **options}
    return MOPODual(NAMES, thresholds={"harmless": 0.5, "short": 0.4} if thresholds is None else thresholds, **options)


def test_exact_refresh_is_the_solution_and_update_only_records():
    labels = data()
    module = dual()
    module.refresh(labels[0], labels[1])
    solution = solve(labels, [0.5, 0.4])
    torch.testing.assert_close(module.multipliers, solution.multipliers)
    torch.testing.assert_close(module.win_rates, solution.win_rates)
    torch.testing.assert_close(module.slack, solution.lower_bounds[1:] - tensor([0.5, 0.4]))

    batch = labels[1] <= labels[1].unique()[3]
    module.update(labels[0][batch], labels[1][batch])
    assert module.step == 1
    torch.testing.assert_close(module.multipliers, solution.multipliers)
    output = mopo_objective(
        torch.zeros(int(batch.sum())), labels[0][batch], labels[1][batch], solution.multipliers, tau=TAU
    )
    torch.testing.assert_close(module.win_rates, output.win_rates)


def test_primary_may_stand_anywhere_and_thresholds_follow_names():
    labels = data()
    module = MOPODual(NAMES, primary="short", thresholds={"harmless": 0.6}, tau=TAU)
    module.refresh(labels[0], labels[1])
    torch.testing.assert_close(module.multipliers, solve(labels, [-math.inf, 0.6], primary=2).multipliers)
    assert module.secondaries == ["help", "harmless"]
    assert module.slack[0] == math.inf


def test_sgd_step_by_hand():
    labels = data(groups=8)
    module = dual(update="sgd", eps=0.05, chi_lr=0.3, multiplier_lr=0.7)
    module.multipliers.copy_(tensor([1.0, 0.5, 0.0]))
    module.chi.fill_(2.0)
    oracle = Oracle(*labels)
    weights = oracle.weights([0.5, 0.0])
    chi, expected = [], []
    for k, (threshold, multiplier) in enumerate([(0.5, 0.5), (0.4, 0.0)], start=1):
        x = np.concatenate([w / r * v[:, k] for w, v, r in zip(weights, oracle.values, oracle.reference, strict=True)])
        q0 = np.concatenate(oracle.reference) / len(oracle.members)

        def penalty(c, x=x, q0=q0):
            return c * np.log(q0 @ np.exp(-x / c)) + c * 0.05

        slope = (penalty(2 + 1e-5) - penalty(2 - 1e-5)) / 2e-5
        chi.append(2 - 0.3 * slope)
        expected.append(max(0.0, multiplier - 0.7 * (-penalty(chi[-1]) - threshold)))
    module.update(labels[0], labels[1])
    np.testing.assert_allclose(module.chi[1:], chi, rtol=1e-8)
    np.testing.assert_allclose(module.multipliers, [1, *expected], rtol=1e-8)
    assert expected[0] != expected[1]


def test_barrier_step_by_hand():
    labels = data(groups=8)
    module = dual(update="barrier", eps=0.01, multiplier_lr=0.25, sigma=0.02, delta=0.05)
    module.multipliers.copy_(tensor([1.0, 0.5, 0.1]))
    slack = Oracle(*labels).lower_bounds([0.5, 0.1], 0.01) - [0.5, 0.4]
    module.update(labels[0], labels[1])
    expected = 0.75 * tensor([0.5, 0.1]) + 0.25 * barrier_multipliers(torch.from_numpy(slack), 0.02, 0.05)
    torch.testing.assert_close(module.multipliers[1:], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_sgd_finds_the_exact_multipliers(eps):
    labels = data()
    thresholds = between(labels, 0.2, eps=eps).tolist()
    module = dual(dict(zip(NAMES[1:], thresholds, strict=True)), update="sgd", eps=eps, multiplier_lr=0.2, chi_lr=0.5)
    for _ in range(2000):
        module.update(labels[0], labels[1])
    expected = solve(labels, thresholds, eps=eps).multipliers
    assert (expected[1:] > 0.05).any()
    torch.testing.assert_close(module.multipliers, expected, rtol=0, atol=1e-3)


def test_barrier_settles_at_the_barriers_optimum_near_the_exact_multipliers():
    labels = data()
    thresholds = between(labels, 0.2).tolist()
    module = dual(
        dict(zip(NAMES[1:], thresholds, strict=True)), update="barrier", multiplier_lr=0.01, sigma=1e-3, delta=2e-3
    )
    for _ in range(2000):
        module.update(labels[0], labels[1])
    expected = solve(labels, thresholds).multipliers
    settled = barrier_multipliers(module.slack, 1e-3, 2e-3)
    torch.testing.assert_close(module.multipliers[1:], settled, rtol=1e-5, atol=0)
    assert (module.slack > 0).all()
    torch.testing.assert_close(module.multipliers, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_default_rates_hold_the_thresholds_on_noisy_batches(update):
    """Eight hard pairs at a time, as the paper trains: the multipliers settle, and where they do, thresholds hold."""
    win_rate, group, _ = data(groups=400, sizes=(2,), objectives=3, hard=True)
    thresholds = between((win_rate, group, None), 0.4).tolist()
    module = dual(dict(zip(NAMES[1:], thresholds, strict=True)), update=update)
    generator = torch.Generator().manual_seed(0)
    ids, path = group.unique(), []
    for _ in range(1500):
        batch = torch.isin(group, ids[torch.randperm(len(ids), generator=generator)[:8]])
        module.update(win_rate[batch], group[batch])
        path.append(module.multipliers.clone())
    late = torch.stack(path[500:])
    assert late.std(0).max() < 0.2
    settled = mopo_objective(torch.zeros(len(group)), win_rate, group, late.mean(0), tau=TAU).win_rates
    assert (settled[1:] > tensor(thresholds) - 0.01).all()
    assert settled[0] > 0.5, "the multipliers ran away"


@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_an_objective_that_the_batch_does_not_label_keeps_its_multiplier(update):
    labels = data(groups=8)
    module = dual(update=update, eps=0.01)
    module.update(labels[0], labels[1])
    before = copy.deepcopy(module.state_dict())
    unlabelled = labels[0].clone()
    unlabelled[:, 2] = math.nan
    module.update(unlabelled, labels[1])
    for name in ("multipliers", "win_rates", "lower_bounds", "chi"):
        now = getattr(module, name)
        assert now[2] == before[name][2], name
        assert now[1] != before[name][1], name


def test_ratchet_raises_thresholds_to_what_the_lagged_policy_attains():
    labels = data(lag=True)
    module = dual({"harmless": 0.3}, ratchet_beta=0.99)
    module.refresh(labels[0], labels[1])
    assert module.thresholds.tolist() == [0.3, -math.inf]
    module.refresh(labels[0], labels[1], labels[2], ratchet=True)
    oracle = Oracle(*labels)
    attained = np.mean([r @ v for r, v in zip(oracle.reference, oracle.values, strict=True)], 0)[1:]
    assert (0.99 * attained > 0.3).all()
    np.testing.assert_allclose(module.thresholds, 0.99 * attained)
    torch.testing.assert_close(module.multipliers, solve(labels, module.thresholds).multipliers)

    high_floor = dual({"harmless": float(attained[0])}, ratchet_beta=0.9)
    high_floor.refresh(labels[0], labels[1], labels[2], ratchet=True)
    np.testing.assert_allclose(high_floor.thresholds, [attained[0], 0.9 * attained[1]])


def test_auto_eps_makes_the_ratchet_feasible_where_the_papers_radius_is_not():
    pairs = win_rate_from_pairs(
        torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()
    )
    group = torch.arange(8).repeat(2)
    module = dual({}, eps="auto")
    with pytest.raises(RuntimeError, match="call refresh before update"):
        module.update(pairs, group)
    module.refresh(pairs, group, ratchet=True)
    assert module.eps.item() == pytest.approx(auto_eps(pairs, group, beta=0.9995))
    with pytest.raises(InfeasibleThresholds):
        dual({}, eps=0.15).refresh(pairs, group, ratchet=True)


def test_lag_is_due_every_so_many_steps():
    labels = data(groups=4)
    module = dual(lag_steps=3)
    due = []
    for _ in range(6):
        module.update(labels[0], labels[1])
        due.append(module.lag_due)
    assert due == [False, False, True, False, False, True]
    assert not dual(lag_steps=3).lag_due
    assert not dual().lag_due


@pytest.mark.parametrize("update", ["exact", "sgd", "barrier"])
def test_infeasible_thresholds_are_named_under_every_rule(update):
    labels = data()
    module = dual({"short": 0.99}, update=update)
    with pytest.raises(InfeasibleThresholds, match=r"objective 'short' must reach 0\.99, but at most 0") as error:
        module.refresh(labels[0], labels[1])
    assert error.value.objective == "short"


def test_a_runaway_multiplier_is_an_error():
    labels = data()
    module = dual({"short": 0.99}, update="sgd", multiplier_lr=1.0, max_multiplier=2.0)
    module.multipliers[2] = 1.9
    with pytest.raises(InfeasibleThresholds, match=r"objective 'short' must reach 0\.99") as error:
        module.update(labels[0], labels[1])
    assert error.value.attainable == pytest.approx(float(attainable_range(labels[0], labels[1], tau=TAU)[1][2]))


# ------------------------------------------------------------------------------------------------- state, distributed


def trained(update="sgd"):
    labels = data()
    module = dual(update=update, eps=0.003)
    module.refresh(labels[0], labels[1])
    for _ in range(3):
        module.update(labels[0], labels[1])
    return module


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("update", ["exact", "sgd", "barrier"])
def test_a_resumed_module_continues_bit_for_bit(tmp_path, update):
    labels = data()
    module = trained(update)
    torch.save(module.state_dict(), tmp_path / "dual.pt")
    resumed = dual(update=update, eps=0.003)
    resumed.load_state_dict(torch.load(tmp_path / "dual.pt", weights_only=True))
    assert_same_state(module.state_dict(), resumed.state_dict())
    for _ in range(2):
        module.update(labels[0], labels[1])
        resumed.update(labels[0], labels[1])
    module.refresh(labels[0], labels[1], ratchet=True)
    resumed.refresh(labels[0], labels[1], ratchet=True)
    assert_same_state(module.state_dict(), resumed.state_dict())


def test_a_model_in_half_precision_keeps_exact_multipliers():
    module = trained()
    before = copy.deepcopy(module.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    model.half().to(torch.bfloat16).to("cpu", torch.float32)
    assert model[0].weight.dtype == torch.float32
    assert_same_state(before, module.state_dict())
    module.to("meta")
    assert module.multipliers.is_meta
    assert module.multipliers.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ["a", "b", "a"]}, "objectives must have different names; a "),
        ({"primary": "c"}, "primary must be one of the objectives a, b; got 'c'"),
        ({"thresholds": {"a": 0.5}}, "'a' is the primary objective"),
        ({"thresholds": {"c": 0.5}}, "'c' is not one of the objectives a, b"),
        ({"thresholds": {"b": math.nan}}, "'b' must have a number below inf; got nan"),
        ({"update": "adam"}, "update must be one of exact, sgd, barrier; got 'adam'"),
        ({"tau": -0.1}, "tau must be a positive number"),
        ({"eps": -0.1}, "eps must be a number >= 0"),
        ({"ratchet_beta": 1.1}, r"beta must lie in \[0, 1\]; got 1.1"),
        ({"chi_lr": 0.0}, "chi_lr must be a positive number"),
        ({"multiplier_lr": -1.0}, "multiplier_lr must be a positive number"),
        ({"lag_steps": 0}, "lag_steps must be a positive number; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    good = {"objectives": ["a", "b"], "primary": "a", "thresholds": {"b": 0.5}}
    arguments = {**good, **change}
    MOPODual(good["objectives"], primary="a", thresholds={"b": 0.5})
    with pytest.raises(ValueError, match=message):
        MOPODual(arguments.pop("objectives"), **arguments)


def test_labels_need_a_column_for_each_objective():
    labels = data(objectives=2)
    for method in (dual().update, dual().refresh):
        with pytest.raises(ValueError, match="one column for each of the objectives help, harmless, short"):
            method(labels[0], labels[1])


def rank_update(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    win_rate, group, lag = data(groups=5 + rank, seed=rank, lag=True)
    module = dual(update="sgd", eps=0.01)
    module.update(win_rate, group, lag)
    torch.save(module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_take_the_step_of_their_joint_batch(tmp_path):
    mp.spawn(rank_update, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_state(first, second)
    parts = [data(groups=5 + rank, seed=rank, lag=True) for rank in range(2)]
    win_rate, lag = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    alone = dual(update="sgd", eps=0.01)
    alone.update(win_rate, torch.cat([parts[0][1], parts[1][1] + 10_000]), lag)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value)
