"""What the figures of `mopo solve` mean for a training run, in sentences; every number is one of its JSON file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mopo_trainer.report.evidence import worth_of_threshold

PAPER_EPS = 0.15
GAIN = "gain"  # what a table shows in place of a negative cost

Found = Mapping[str, Any]  # of `solve.summary`, and with `sweeps` of `solve.analyse`


def table(found: Found) -> Table:
    """The findings, each behind what it is about."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for subject, sentence in findings(found):
        grid.add_row(subject, escape(sentence))
    return grid


def findings(found: Found) -> list[tuple[str, str]]:
    """(subject, sentence) of everything worth knowing before training."""
    parts = {"conflict": _conflict, "binding": _binding, "labels": _labels, "fresh": _fresh, "eps": _eps, GAIN: _gain}
    return [(subject, " ".join(sentences)) for subject, part in parts.items() if (sentences := list(part(found)))]


def _conflict(found: Found) -> Iterator[str]:
    """Which objectives the primary alone lowers, leaves where they are (within the interval), or raises."""
    secondaries = found["objectives"][1:]
    correlations = dict(zip((row["objective"] for row in secondaries), found["rank_correlations"][0][1:], strict=True))
    raised = [row["objective"] for row in secondaries if row["free_interval"][0] > row["reference"]]
    effects = []
    for row in secondaries:
        if row["objective"] not in raised:
            verb = "lowers" if row["free_interval"][1] < row["reference"] else "does not move"
            correlation = correlations[row["objective"]]
            ranks = "" if correlation is None else f", rank correlation {correlation:+.2f}"
            effects.append(f"{verb} {row['objective']} ({_rate(row['free_win_rate'], row['free_interval'])}{ranks})")
    if raised:
        known = sorted(x for name in raised if (x := correlations[name]) is not None)
        spread = " to ".join(dict.fromkeys(f"{x:+.2f}" for x in (known[:1] + known[-1:])))
        ranks = f" (rank correlation {spread})" if known else ""
        effects.append(f"raises {_names(raised) if effects else 'every other objective'}{ranks}")
    if effects:
        yield f"{found['primary']} alone {', '.join(effects)}."
    if raised and len(raised) == len(secondaries) and not _asked(found):
        yield "One objective would do, unless more than `free` is asked of another."


def _binding(found: Found) -> Iterator[str]:
    """Which thresholds have a price."""
    asked = _asked(found)
    binding = [row["objective"] for row in asked if row["multiplier"] > 0]
    by_themselves = [row["objective"] for row in asked if row["multiplier"] == 0]
    if asked and not binding:
        yield f"No threshold binds: {found['primary']} alone holds {_names(by_themselves)}. One objective would do."
    elif by_themselves:
        yield f"{_names(binding)}; {_names(by_themselves)} hold{'s' * (len(by_themselves) == 1)} without a price."
    elif asked:
        yield f"{_names(binding)}."


def _labels(found: Found) -> Iterator[str]:
    """How sure the win rates that hold the thresholds are, and what makes them surer."""
    if not _asked(found):
        return
    measured = (
        f"{row['objective']} {_rate(row['win_rate'], row['interval'])} on {row['labelled_groups']:,} prompts"
        for row in _asked(found)
    )
    yield f"95% intervals over prompts: {', '.join(measured)}."
    unsafe = [row for row in _asked(found) if row["interval"][0] < row["threshold"]]
    if not unsafe:
        yield "Every threshold lies below its interval."
        return
    yield f"On other prompts of the kind {_names([row['objective'] for row in unsafe])} may miss the threshold."
    safe = found["safe"]
    if safe is None:
        yield "No eps makes it safe: lower the threshold or label more prompts."
        return
    multipliers = dict(zip((row["objective"] for row in found["objectives"]), safe["multipliers"], strict=True))
    prices = ", ".join(f"λ {multipliers[row['objective']]:.3f} for {row['objective']}" for row in unsafe)
    now, then = found["objectives"][0]["win_rate"], safe["win_rates"][0]
    yield f"--eps {safe['eps']:g} makes it safe: {prices}, {found['primary']} {then:.3f} instead of {now:.3f}."


def _fresh(found: Found) -> Iterator[str]:
    """What thresholds within small groups are worth against texts that the policy will write."""
    sure = [row for row in _asked(found) if row["sure"]]
    for row in sure:
        yield worth_of_threshold(row["objective"], row["threshold"], found["group_size"])
    if sure:
        yield "(If comparisons are right and seldom tie.)"


def _eps(found: Found) -> Iterator[str]:
    """How large a radius the thresholds allow, where that is less than the paper's."""
    limits = {row["objective"]: row["largest_eps"] for row in _asked(found) if row["largest_eps"] is not None}
    if limits and min(limits.values()) < PAPER_EPS:
        tightest = min(limits, key=lambda name: limits[name])
        reason = why_bounds_are_low(found["group_size"], PAPER_EPS, found["bound_of_one"])
        yield f"{tightest} allows eps = {two_digits(limits[tightest])} at most, the paper's {PAPER_EPS} not: {reason}."


def why_bounds_are_low(group_size: int, eps: float, bound_of_one: float) -> str:
    """Why a radius that is small elsewhere is large here."""
    return (
        f"a target that settles on one of {group_size} responses leaves the others at 0, and the ball moves weight "
        f"there; at {eps:g} it brings a win rate of 1 down to {bound_of_one:.2f}"
    )


def _gain(found: Found) -> Iterator[str]:
    """Why a threshold may raise the primary."""
    costs = [row["cost"] for row in _asked(found)]
    costs += [line["primary"][0] - rate for line in shown_sweeps(found) for rate in line["primary"]]
    if any(is_gain(cost) for cost in costs):
        yield (
            f"Some thresholds raise {found['primary']} too (by up to {-min(costs):.3f}): what is maximised is its win "
            "rate less tau × KL, and they take the target farther from the reference. A smaller --tau does that "
            "without them."
        )


def shown_sweeps(found: Found) -> list[Mapping[str, Any]]:
    """The sweeps of the thresholds that are asked for; all of them where none is."""
    asked = [row["objective"] for row in _asked(found)]
    return [line for line in found.get("sweeps", ()) if not asked or line["objective"] in asked]


def is_gain(cost: float) -> bool:
    """Whether the three digits shown of a cost are negative."""
    return round(cost, 3) < 0


def two_digits(value: float) -> str:
    """Rounded down, so that what is said to be attainable is."""
    if value == 0:
        return "0"
    digits = 1 - math.floor(math.log10(value))
    return f"{math.floor(value * 10**digits) / 10**digits:g}"


def bracket(interval: Sequence[float]) -> str:
    low, high = interval
    return f"[{low:.2f}, {high:.2f}]".replace("0.", ".")


def _rate(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} {bracket(interval)}"


def _asked(found: Found) -> list[Mapping[str, Any]]:
    return [row for row in found["objectives"] if row["threshold"] is not None]


def _names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
