"""MOPO where the truth is known: twelve questions, under ten minutes on one core.

    python -m bench.studies.tabular.run bench/results/tabular           results.json, pictures, docs/results.md
    python -m bench.studies.tabular.run bench/results/tabular sampled   one question anew, the others' answers stay

Every number of the tables is in results.json; `bench.studies.tabular.report` makes pictures and text of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.studies.tabular import methods, report, truth
from bench.studies.tabular.problems import PROBLEMS, TAU, Problem
from bench.studies.tabular.training import Schedule, train
from mopo_kernels import InfeasibleThresholds, solve_tabular
from mopo_kernels.objective.dual import attainable_range, auto_eps
from mopo_kernels.objective.steps import STEPS
from mopo_trainer.commands.pareto import TabularProblem, front
from mopo_trainer.files import atomic_path

Row = dict[str, Any]
PAIRS_OF_OBJECTIVES = [name for name, problem in PROBLEMS.items() if len(problem.preference) == 2]
CONFLICTS = ["opposed", "by a scorer", "rock-paper-scissors", "concave"]  # labels are drawn for these


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: int = 12  # where labels are few
    draws: int = 5  # where they are many
    runs: int = 3  # of training
    groups: int = 4096
    comparisons: tuple[int, ...] = (10, 100, 1000, 10_000)
    points: int = 21  # of a front
    updates: int = 2000  # of the multipliers
    steps: int = 500  # of training


SMALL = Size(seeds=2, draws=1, runs=1, groups=64, comparisons=(10, 100), points=4, updates=20, steps=10)


# ------------------------------------------------------------------------------------- is the optimum the optimum?


def agreement(size: Size) -> Iterator[Row]:
    """The exact solver against SLSQP; where sgd and barrier stand after so many full-batch updates."""
    for name, problem in PROBLEMS.items():
        errors = []
        for share in (0.25, 0.5, 0.75):
            bounds = problem.thresholds(share)
            true = truth.best_policy(problem, bounds)
            found = solve_tabular(problem.preference, problem.mu, problem.pi_ref, bounds, tau=TAU)
            dual = methods.exact(methods.whole(problem), bounds)
            errors.append(
                [
                    float(np.abs(found.policy.numpy() - true).max()),
                    float(np.abs(found.win_rates.numpy() - problem.win_rates(true)).max()),
                    abs(found.value - problem.worth(true)),
                    float((found.multipliers - dual.multipliers).abs().max()),
                ]
            )
        bounds = problem.thresholds(0.5)
        rules = {rule: _approach(problem, bounds, rule, size.updates) for rule in ("sgd", "barrier")}
        exact = methods.exact(methods.whole(problem), bounds)
        yield {
            "problem": name,
            "error": dict(zip(["policy", "win_rate", "value", "multipliers"], np.max(errors, 0).tolist(), strict=True)),
            "multipliers": exact.multipliers.tolist(),
            "value": exact.value,
            "rules": rules,
        }


def _approach(problem: Problem, bounds: torch.Tensor, rule: str, updates: int) -> list[Row]:
    """Multipliers, worst slack and value at doubling numbers of updates."""
    data, rows = methods.whole(problem), []
    steps = methods.stepped_multipliers(data, bounds, rule, steps=updates, batch=1)
    for number, multipliers in enumerate(steps, start=1):
        if number == updates or (number >= 50 and (number & (number - 1)) == 0):
            policy = methods.tilt(problem, (multipliers @ problem.values).numpy())
            slack = problem.win_rates(policy)[1:] - bounds.numpy()
            rows.append({"updates": number, "multipliers": multipliers.tolist(), "slack": float(slack.min()),
                         "value": problem.worth(policy)})  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------------ fronts


def fronts(size: Size) -> Iterator[Row]:
    """How much of the true front so many thresholds, or so many weights, reach at one tau."""
    for name, problem in PROBLEMS.items():
        command = _command_problem(name, problem)
        dense = [point["thresholds"] for point in front(command, 2 * size.points)["points"]]
        bounds = [[wanted.get(k, 0.0) for k in command.objectives[1:]] for wanted in dense]
        policies = [truth.best_policy(problem, b) for b in bounds]
        true = [problem.win_rates(policy).tolist() for policy in policies if policy is not None]
        points = {"MOPO": [point["win_rates"] for point in front(command, size.points)["points"]]}
        points |= _weighted_fronts(problem, len(points["MOPO"]))
        shown = {"truth": true, **points} if len(problem.preference) == 2 else {}
        yield {
            "problem": name,
            "objectives": len(problem.preference),
            "unsolved": sum(policy is None for policy in policies),
            "methods": {
                method: truth.indicators(found, true)
                | ({"gap": truth.largest_gap(found)} if len(problem.preference) == 2 else {})
                for method, found in points.items()
            },
            "points": shown,
            "responses": problem.values.T.tolist(),
        }


def _command_problem(name: str, problem: Problem) -> TabularProblem:
    objectives, responses = problem.values.shape
    return TabularProblem(
        name=name, objectives=tuple(f"objective {k}" for k in range(objectives)),
        responses=tuple(str(y) for y in range(responses)), P=problem.preference, mu=problem.mu, pi_ref=problem.pi_ref,
        tau=TAU, thresholds={},
    )  # fmt: skip


def _weighted_fronts(problem: Problem, count: int) -> dict[str, list[list[float]]]:
    """The families over weights of the simplex, each policy as far from pi_ref as the weighted win rates' is there."""
    values, preference = problem.values.numpy(), problem.preference.numpy()
    families = methods.families(preference, values, np.outer(problem.mu, problem.mu))
    found: dict[str, list[list[float]]] = {family: [] for family in families}
    for weights in _weights(len(values), count):
        kl = problem.kl(methods.tilt(problem, weights @ values / weights[0]))
        for family, scores in families.items():
            found[family].append(problem.win_rates(methods.tilt_to(problem, scores(weights), kl)).tolist())
    return found


def _weights(objectives: int, count: int) -> np.ndarray:  # [count, K]
    """Equally spaced for two objectives, else uniform over the simplex; the primary keeps at least 1%."""
    if objectives == 2:
        first = np.linspace(1, 0.01, count)
        return np.stack([first, 1 - first], 1)
    draws = torch.quasirandom.SobolEngine(objectives, scramble=True, seed=0).draw(count, dtype=torch.float64)
    weights = -draws.clamp(1e-9, 1 - 1e-9).log().numpy()
    weights /= weights.sum(1, keepdims=True)
    weights[:, 0] = np.maximum(weights[:, 0], 0.01)
    return weights / weights.sum(1, keepdims=True)


# --------------------------------------------------------------------------------------------------------- baselines


def baselines(size: Size) -> Iterator[Row]:
    """The primary's win rate with labels without end, at the threshold and at the truth's KL."""
    for name, share in itertools.product(PAIRS_OF_OBJECTIVES, (0.0, 0.25, 0.5, 0.75)):
        problem = PROBLEMS[name]
        threshold = problem.thresholds(share)
        true = truth.best_policy(problem, threshold)
        values, preference = problem.values.numpy(), problem.preference.numpy()
        families = methods.families(preference, values, np.outer(problem.mu, problem.mu))
        kl = problem.kl(true)
        for family, scores in families.items():
            policy = None
            with suppress(ValueError):  # not even the secondary alone reaches the threshold at this KL
                policy = methods.at_threshold(problem, two_weights(scores), float(threshold), kl)
            yield {
                "problem": name,
                "share": share,
                "truth": problem.win_rates(true).tolist(),
                "true_kl": kl,
            } | _outcome(problem, family, policy)


def two_weights(scores: Callable[[np.ndarray], np.ndarray]) -> methods.Family:
    """A family of two objectives by the secondary's share of the weight."""
    return lambda share: scores(np.array([1 - share, share]))


# -------------------------------------------------------------------------------------------- groups, labels, steps


def groups(size: Size) -> Iterator[Row]:
    """What the target says, what it truly wins and what the policy wins, by group size and kind of label."""
    for name, hard, n in itertools.product(CONFLICTS, (False, True), (2, 4, 8, 64)):
        problem, bounds = PROBLEMS[name], PROBLEMS[name].thresholds(0.5)
        for seed in range(size.draws):
            generator = np.random.default_rng([seed, n, hard])
            data = methods.draw_groups(problem, max(8, min(size.groups, 4 * size.groups // n)), n, generator, hard=hard)
            solution = methods.exact(data, bounds)
            yield {
                "problem": name, "labels": "drawn" if hard else "exact", "n": n, "seed": seed,
                "threshold": float(bounds), "multiplier": float(solution.multipliers[1]),
                "said": solution.win_rates.tolist(),
                "target": methods.target_win_rates(problem, data, solution.multipliers).tolist(),
                "steps": _fitted(problem, data, solution.multipliers),
            }  # fmt: skip


def _fitted(problem: Problem, data: methods.Groups, multipliers: torch.Tensor) -> Row:
    policies = {step: methods.fit(problem, data, multipliers, step) for step in STEPS}
    return {
        step: {"win_rates": problem.win_rates(policy).tolist(), "kl": problem.kl(policy)}
        for step, policy in policies.items()
    }


def crossed(size: Size) -> Iterator[Row]:
    """The multiplier of `solve_dual` and that of comparisons which the weights have not seen, drawn labels."""
    for name, n, seed in itertools.product(("opposed", "concave"), (4, 8, 16), range(size.draws)):
        problem, bounds = PROBLEMS[name], PROBLEMS[name].thresholds(0.5)
        data = methods.draw_groups(problem, size.groups // n, n, np.random.default_rng([seed, n]), hard=True)
        found: dict[str, torch.Tensor | None] = {"labels": methods.exact(data, bounds).multipliers, "unseen": None}
        with suppress(ValueError):
            found["unseen"] = methods.crossed_multipliers(data, float(bounds))
        for judged, multipliers in found.items():
            yield {
                "problem": name, "n": n, "seed": seed, "judged": judged, "threshold": float(bounds),
                "multiplier": None if multipliers is None else float(multipliers[1]),
                "steps": None if multipliers is None else _fitted(problem, data, multipliers),
            }  # fmt: skip


def opponents(size: Size) -> Iterator[Row]:
    """Groups of 4 whose responses met each other, or so many others: what the threshold then is worth."""
    for name, count, seed in itertools.product(CONFLICTS[:2], (None, 1, 3, 8, 32, 128), range(size.draws)):
        problem, bounds = PROBLEMS[name], PROBLEMS[name].thresholds(0.5)
        generator = np.random.default_rng([seed, count or 0])
        data = methods.draw_groups(problem, size.groups, 4, generator, hard=True)
        if count is not None:
            data = methods.against_others(problem, data, count, generator)
        multipliers = methods.exact(data, bounds).multipliers
        yield {
            "problem": name, "opponents": count, "seed": seed, "threshold": float(bounds),
            "multiplier": float(multipliers[1]), "steps": _fitted(problem, data, multipliers),
            "truth": problem.win_rates(truth.best_policy(problem, bounds)).tolist(),
        }  # fmt: skip


def off_policy(size: Size) -> Iterator[Row]:
    """Responses that another policy wrote, with and without pi_ref / mu as importance weights; labels exact."""
    problem = PROBLEMS["skewed mu and pi_ref"]
    bounds = problem.thresholds(0.5)
    for weighted, n, seed in itertools.product((False, True), (4, 64), range(size.draws)):
        generator = np.random.default_rng([seed, n])
        data = methods.draw_groups(
            problem, max(8, min(size.groups, 4 * size.groups // n)), n, generator, hard=False, weighted=weighted
        )
        multipliers = methods.exact(data, bounds).multipliers
        yield {
            "weighted": weighted, "n": n, "seed": seed, "threshold": float(bounds), "multiplier": float(multipliers[1]),
            "target": methods.target_win_rates(problem, data, multipliers).tolist(),
            "steps": _fitted(problem, data, multipliers),
            "truth": problem.win_rates(truth.best_policy(problem, bounds)).tolist(),
        }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- sampled labels


def sampled(size: Size) -> Iterator[Row]:
    """10 to 10,000 drawn comparisons, as pairs, as groups of 4 (six each) and pooled; baselines on the pairs."""
    for name, count, seed in itertools.product(CONFLICTS, size.comparisons, range(size.seeds)):
        problem, bounds = PROBLEMS[name], PROBLEMS[name].thresholds(0.5)
        generator = np.random.default_rng([seed, count])
        pairs = methods.draw_groups(problem, count, 2, generator, hard=True)
        fours = methods.draw_groups(problem, max(2, round(count / 6)), 4, generator, hard=True)
        common = {"problem": name, "comparisons": count, "seed": seed, "threshold": float(bounds)}
        for layout, data in {"pairs": pairs, "groups of 4": fours}.items():
            yield from (common | row for row in _mopo_rows(problem, data, bounds, layout))
        yield common | _pooled_row(problem, pairs, bounds)
        yield from (common | row for row in _baseline_rows(problem, pairs, float(bounds)))


def _mopo_rows(problem: Problem, data: methods.Groups, bounds: torch.Tensor, layout: str) -> Iterator[Row]:
    try:
        multipliers = methods.exact(data, bounds).multipliers
    except InfeasibleThresholds:
        yield from (_outcome(problem, f"{step}, {layout}", None) for step in STEPS)
        return
    for step in STEPS:
        yield _outcome(problem, f"{step}, {layout}", methods.fit(problem, data, multipliers, step))


def _pooled_row(problem: Problem, pairs: methods.Groups, bounds: torch.Tensor) -> Row:
    """The target itself, over one group of all responses."""
    data, policy = methods.pooled(problem, pairs), None
    with suppress(InfeasibleThresholds):
        multipliers = methods.exact(data, bounds).multipliers
        policy = methods.tilt(problem, (data.win_rate.nan_to_num(nan=0.5) @ multipliers).numpy())
    return _outcome(problem, "target, labels pooled", policy)


def _baseline_rows(problem: Problem, pairs: methods.Groups, threshold: float) -> Iterator[Row]:
    """Each at the truth's KL, the weight chosen so that the labels themselves say that the threshold holds."""
    preference, count = methods.pair_counts(pairs, len(problem.mu))
    kl = problem.kl(truth.best_policy(problem, [threshold]))
    seen = count.sum(1)
    values = np.where(seen > 0, (preference * count).sum(2) / np.maximum(seen, 1), 0.5)
    estimated = replace(problem, preference=_with_values(problem, values))
    for family, scores in methods.families(preference, values, count).items():
        if family == "weighted win rates":
            continue  # the pooled target but for its KL

        policy = None
        with suppress(ValueError):  # no weight brings the secondary there
            policy = methods.at_threshold(estimated, two_weights(scores), threshold, kl)
        yield _outcome(problem, family, policy)
        if family == "DPO on weighted labels":
            yield _outcome(problem, "DPO on the primary", methods.tilt_to(problem, two_weights(scores)(0.0), kl))


def _with_values(problem: Problem, values: np.ndarray) -> torch.Tensor:  # [K, Y, Y]
    """Preferences whose win rates are these, whatever mu: each row constant."""
    return torch.from_numpy(values)[:, :, None].expand(problem.preference.shape)


def _outcome(problem: Problem, method: str, policy: np.ndarray | None) -> Row:
    """True win rates and KL of a policy; None where the labels' thresholds were refused."""
    if policy is None:
        return {"method": method, "win_rates": None, "kl": None}
    return {"method": method, "win_rates": problem.win_rates(policy).tolist(), "kl": problem.kl(policy)}


def rules(size: Size) -> Iterator[Row]:
    """The three ways to move the multipliers, on 1,000 comparisons in groups of 4, batches of 8 groups."""
    problem = PROBLEMS["opposed"]
    bounds = problem.thresholds(0.5)
    for seed in range(size.seeds):
        data = methods.draw_groups(problem, 167, 4, np.random.default_rng([seed, 1000]), hard=True)
        found = {"exact": methods.exact(data, bounds).multipliers}
        for rule in ("sgd", "barrier"):
            *_, found[rule] = methods.stepped_multipliers(
                data, bounds, rule, steps=size.updates // 2, batch=8, seed=seed
            )  # fmt: skip
        for rule, multipliers in found.items():
            yield {
                "rule": rule, "seed": seed, "multiplier": float(multipliers[1]), "threshold": float(bounds),
                "steps": _fitted(problem, data, multipliers),
            }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- ablations


def lag(size: Size) -> Iterator[Row]:
    """The paper's beta and t0. Its 10,000 steps are 500 here, and t0 = 100 and 1,000 are 5 and 50."""
    problem = PROBLEMS["opposed"]
    bounds = problem.thresholds(0.25)
    base, lags = Schedule(steps=size.steps, beta=0.99), (1, 5, 50, None)
    schedules = [replace(base, beta=beta, lag=t0) for beta in (0.9, 0.95, 0.99, 0.999) for t0 in lags[:3]]
    schedules += [replace(base, lag=None)]  # without a refresh there is no ratchet
    schedules += [replace(base, rule="sgd", lag=t0) for t0 in (5, None)]
    schedules += [replace(base, step=step, lag=t0) for step in ("contrast", "regress") for t0 in (5, None)]
    for schedule, seed in itertools.product(schedules, range(size.runs)):
        data = methods.draw_groups(problem, 64, 8, np.random.default_rng(seed), hard=False)
        run = train(problem, data, bounds, schedule, seed)
        yield asdict(schedule) | {
            "seed": seed, "asked": float(bounds), "win_rates": problem.win_rates(run.policy).tolist(),
            "kl": problem.kl(run.policy), "multiplier": run.multipliers[1], "threshold": run.thresholds[0],
            "stopped": run.stopped,
        }  # fmt: skip


def radius(size: Size) -> Iterator[Row]:
    """eps in {0, auto, 0.15}: are thresholds attainable, does the policy hold them, what does it cost."""
    problem = PROBLEMS["opposed"]
    bounds = problem.thresholds(0.5)
    for n, seed in itertools.product((2, 4, 8), range(size.seeds)):
        count = size.comparisons[-2]
        data = methods.draw_groups(
            problem, max(2, round(count / (n * (n - 1) / 2))), n, np.random.default_rng([seed, n, count]), hard=True
        )
        for eps in (0.0, "auto", 0.15):
            value = auto_eps(data.win_rate, data.group, beta=0.9995) if eps == "auto" else eps
            row: Row = {"n": n, "comparisons": count, "seed": seed, "eps": eps, "radius": value}
            row |= {"threshold": float(bounds), "multiplier": None, "win_rates": None, "attainable": None}
            try:
                multipliers = methods.exact(data, bounds, eps=value).multipliers
            except InfeasibleThresholds as error:
                row["attainable"] = error.attainable
            else:
                row["multiplier"] = float(multipliers[1])
                row["win_rates"] = problem.win_rates(methods.fit(problem, data, multipliers, "clone")).tolist()
            yield row


def robust(size: Size) -> Iterator[Row]:
    """The robust bound with labels without end: what the paper's form of policy attains, and what any policy could."""
    for name, eps in itertools.product(PAIRS_OF_OBJECTIVES, (0.001, 0.01, 0.15)):
        problem = PROBLEMS[name]
        data = methods.whole(problem)
        free, best = (
            bound[1].item()
            for bound in attainable_range(data.win_rate, data.group, tau=TAU, eps=eps, lag_log_ratio=data.omega)
        )
        threshold = [(free + best) / 2]
        found = methods.tilt(
            problem, (methods.exact(data, torch.tensor(threshold), eps=eps).multipliers @ problem.values).numpy()
        )
        true = truth.best_policy(problem, threshold, eps=eps)
        yield {
            "problem": name, "eps": eps, "free": free, "best": best, "best_of_all": truth.best_bound(problem, eps),
            "threshold": threshold[0], "value": problem.worth(found), "true_value": problem.worth(true),
            "bound": truth.robust_mean(found, problem.pi_ref.numpy(), problem.values.numpy()[1], eps)[0],
        }  # fmt: skip


QUESTIONS = {
    question.__name__: question
    for question in (
        agreement,
        fronts,
        baselines,
        groups,
        crossed,
        opponents,
        off_policy,
        sampled,
        rules,
        lag,
        radius,
        robust,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of results.json and the pictures")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--small", action="store_true", help="a few seeds and steps, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, path = SMALL if options.small else Size(), options.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() and options.questions else {}
    for question in options.questions or QUESTIONS:
        results |= ask(question, size, results)
        write_rows(path, results)
        print(f"{question}: {results['cpu_seconds'][question]} s", flush=True)
    if set(results["rows"]) == set(QUESTIONS):
        report.write(results, options.output, None if options.small else report.PAGE)


def write_rows(path: Path, results: dict[str, Any]) -> None:
    """JSON with a row a line."""
    head = {key: value for key, value in results.items() if key != "rows"}
    answers = []
    for question, rows in results["rows"].items():
        lines = ",\n".join(map(json.dumps, rows))
        answers.append(f"{json.dumps(question)}: [\n{lines}\n]")
    joined = ",\n".join(answers)
    with atomic_path(path) as temporary:
        temporary.write_text(f'{json.dumps(head)[:-1]}, "rows": {{\n{joined}\n}}}}\n', encoding="utf-8")


def ask(question: str, size: Size, known: dict[str, Any]) -> dict[str, Any]:
    """Results with the answer to one question, in place of an earlier one."""
    start = time.process_time()
    rows = [_rounded(row) for row in QUESTIONS[question](size)]
    return {
        "size": asdict(size),
        "tau": TAU,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread",
        "cpu_seconds": known.get("cpu_seconds", {}) | {question: round(time.process_time() - start, 1)},
        "rows": known.get("rows", {}) | {question: rows},
    }


def _rounded(row: Row) -> Row:
    """Six digits are more than the seeds agree on; errors keep theirs."""
    return json.loads(json.dumps(row), parse_float=lambda text: float(f"{float(text):.6g}"))


if __name__ == "__main__":
    main()
