"""bench/studies/tabular: its own mathematics against closed forms, its page against its numbers, a tiny run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.studies.tabular import methods, report, run, truth
from bench.studies.tabular.problems import PROBLEMS, TAU
from bench.studies.tabular.training import Schedule, train
from mopo_kernels import robust_bound, solve_tabular

ROOT = Path(__file__).parents[1]
CYCLE, OPPOSED = PROBLEMS["rock-paper-scissors"], PROBLEMS["opposed"]


def enumerated_pairs(problem, values):
    """All pairs of a table, equally often, under given win rates [K, Y]."""
    responses = len(problem.mu)
    response = torch.cartesian_prod(torch.arange(responses), torch.arange(responses)).flatten()
    return methods.Groups(values.T[response], torch.arange(responses**2).repeat_interleave(2), response)


# ---------------------------------------------------------------------------------------------------------- the truth


def test_without_a_threshold_that_binds_the_truth_is_the_tilt_by_the_primary():
    for problem in PROBLEMS.values():
        found = truth.best_policy(problem, np.zeros(len(problem.preference) - 1))
        np.testing.assert_allclose(found, methods.tilt(problem, problem.values[0].numpy()), atol=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.15, 5.0])
def test_the_robust_mean_is_the_librarys_and_its_slope_is_the_difference_quotient(eps):
    ref, values = OPPOSED.pi_ref.numpy(), OPPOSED.values[1].numpy()
    policy = methods.tilt(OPPOSED, OPPOSED.values[0].numpy(), 3.0)
    bound, slope = truth.robust_mean(policy, ref, values, eps)
    expected, _ = robust_bound(torch.from_numpy(policy / ref * values), torch.from_numpy(ref), eps)
    assert bound == pytest.approx(float(expected), abs=1e-8)
    for y in range(len(policy)):
        step = 1e-6 * np.eye(len(policy))[y]
        moved = [truth.robust_mean(policy + sign * step, ref, values, eps)[0] for sign in (1, -1)]
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(slope[y], abs=1e-5)


def test_a_front_against_itself_and_without_its_middle():
    front = np.array([[0.9, 0.1], [0.6, 0.6], [0.1, 0.9]])
    assert truth.indicators(front, front) == {"hypervolume": 1.0, "igd_plus": 0.0, "epsilon": 0.0}
    found = truth.indicators(front[[0, 2]], front)
    assert found["hypervolume"] == pytest.approx(0.17 / 0.42)
    assert found["epsilon"] == pytest.approx(0.5)
    assert truth.largest_gap(front[[0, 2]]) == pytest.approx(0.8)


# -------------------------------------------------------------------------------------------------------- the policies


@pytest.mark.parametrize("problem", [CYCLE, OPPOSED], ids=["cycle", "opposed"])
def test_a_bradley_terry_fit_keeps_win_rates_even_in_a_circle(problem):
    """The likelihood's slope is zero where expected wins are the wins: sum_y' mu (P - sigmoid(r_y - r_y')) = 0."""
    mu, preference = problem.mu.numpy(), problem.preference[0].numpy()
    r = methods.dpo_scores(preference, np.outer(mu, mu))
    implied = (1 / (1 + np.exp(r[None] - r[:, None]))) @ mu
    np.testing.assert_allclose(implied, problem.values[0], atol=2e-3)  # the ridge takes the rest


def test_weighted_win_rates_at_the_truths_kl_are_mopos_optimum():
    threshold = OPPOSED.thresholds(0.5)
    mopo = solve_tabular(OPPOSED.preference, OPPOSED.mu, OPPOSED.pi_ref, threshold, tau=TAU)
    values = OPPOSED.values.numpy()
    family = run.two_weights(lambda weights: weights @ values)
    kl = OPPOSED.kl(mopo.policy)
    policy = methods.at_threshold(OPPOSED, family, float(threshold), kl)
    np.testing.assert_allclose(policy, mopo.policy, atol=1e-6)
    with pytest.raises(ValueError, match="different signs"):  # pi_ref has a half, and this KL is no way off
        methods.at_threshold(OPPOSED, family, 0.6, 1e-3)


def test_clone_imitates_the_weights_and_contrast_finds_the_tilt():
    """On pairs under true win rates clone ends at each response's mean weight, contrast at pi_ref exp(s / tau)."""
    multipliers = torch.tensor([1.0, 0.8], dtype=torch.float64)
    data = enumerated_pairs(OPPOSED, OPPOSED.values)
    scores = (multipliers @ OPPOSED.values).numpy()
    sigmoid = 1 / (1 + np.exp((scores[None] - scores[:, None]) / TAU))
    np.testing.assert_allclose(methods.fit(OPPOSED, data, multipliers, "clone"), 2 * sigmoid.mean(1) / 6, atol=1e-6)
    np.testing.assert_allclose(
        methods.fit(OPPOSED, data, multipliers, "contrast"), methods.tilt(OPPOSED, scores), atol=1e-6
    )
    np.testing.assert_allclose(
        methods.fit(OPPOSED, data, multipliers, "regress"), methods.tilt(OPPOSED, scores / 2), atol=1e-6
    )
    np.testing.assert_allclose(
        methods.target_win_rates(OPPOSED, data, multipliers), OPPOSED.win_rates(2 * sigmoid.mean(1) / 6)
    )


def test_contrast_compares_with_mu_where_the_weights_carry_pi_ref_over_mu():
    """An off-policy data set with importance weights has pi_ref exp(s / tau) as its optimum, not mu exp(s / tau)."""
    problem = PROBLEMS["skewed mu and pi_ref"]
    multipliers = torch.tensor([1.0, 0.5], dtype=torch.float64)
    data = enumerated_pairs(problem, problem.values)
    data = data._replace(omega=(problem.pi_ref / problem.mu).log()[data.response])
    expected = methods.tilt(problem, (multipliers @ problem.values).numpy())
    np.testing.assert_allclose(methods.fit(problem, data, multipliers, "contrast"), expected, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the labels


def test_drawn_labels_average_to_preferences_and_their_halves_share_no_comparison():
    generator = np.random.default_rng(0)
    data = methods.draw_groups(OPPOSED, 4000, 4, generator, hard=True)
    at_zero = data.response == 0
    assert float(data.win_rate[at_zero, 0].mean()) == pytest.approx(float(OPPOSED.values[0, 0]), abs=0.02)
    two, one = data.halves  # of three opponents two stand at places of the other parity
    torch.testing.assert_close((2 * two + one) / 3, data.win_rate)
    for half in data.halves:  # a comparison gives one win between its two sides, so both are in the same half
        torch.testing.assert_close(half.view(4000, 4, 2).mean(1), torch.full((4000, 2), 0.5).double())
    many = methods.against_others(OPPOSED, data, 400, generator)
    assert (many.win_rate - OPPOSED.values.T[data.response]).abs().mean() < 0.03


def test_the_multiplier_by_unseen_comparisons_is_that_of_the_dual_where_labels_have_no_luck():
    data = methods.draw_groups(OPPOSED, 60, 4, np.random.default_rng(0), hard=False)
    exact = OPPOSED.values.T[data.response]
    data = data._replace(win_rate=exact, halves=torch.stack([exact, exact]))
    expected = methods.exact(data, OPPOSED.thresholds(0.5)).multipliers
    torch.testing.assert_close(methods.crossed_multipliers(data, float(OPPOSED.thresholds(0.5))), expected)


def test_training_ends_where_the_loss_is_least():
    data = methods.draw_groups(OPPOSED, 8, 4, np.random.default_rng(0), hard=False)
    threshold = OPPOSED.thresholds(0.5)
    found = train(OPPOSED, data, threshold, Schedule(steps=300, batch=8, rate=0.1), seed=0)
    multipliers = methods.exact(data, threshold).multipliers
    assert found.multipliers == pytest.approx(multipliers.tolist())
    np.testing.assert_allclose(found.policy, methods.fit(OPPOSED, data, multipliers, "clone"), atol=0.01)


# ------------------------------------------------------------------------------------------------------------ the whole


def test_the_page_is_what_the_numbers_make_of_it():
    results = json.loads((ROOT / "bench/results/tabular/results.json").read_text())
    page = (ROOT / "docs/results.md").read_text()
    committed = page.partition(report.BEGIN)[2].partition(report.END)[0]
    assert committed == f"\n\n{report.section(results)}\n\n"


def test_a_section_is_added_to_a_page_without_one(tmp_path):
    page = tmp_path / "results.md"
    page.write_text("# Results\n\nOther.\n")
    for text in ("first", "second"):
        report.insert(page, text)
    assert page.read_text() == f"# Results\n\nOther.\n\n{report.BEGIN}\n\nsecond\n\n{report.END}\n"


def test_a_tiny_run(tmp_path):
    known = run.ask("off_policy", run.SMALL, {})
    run.write_rows(tmp_path / "results.json", run.ask("rules", run.SMALL, known))
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [len(rows) for rows in found.values()] == [4, 6]
    steps = [row["steps"] for rows in found.values() for row in rows]
    assert all(0 < rate < 1 for row in steps for step in row.values() for rate in step["win_rates"])


@pytest.mark.slow
def test_a_small_run_of_everything(tmp_path):
    results = {}
    for question in run.QUESTIONS:
        results |= run.ask(question, run.SMALL, results)
    report.write(results, tmp_path, tmp_path / "page.md")
    assert {path.name for path in tmp_path.glob("*.png")} == {"fronts.png", "steps.png", "sampled.png"}
    assert max(row["error"]["policy"] for row in results["rows"]["agreement"]) < 1e-6
