"""What the measurements of the GPU report amount to: goals met or missed, and entries of the tables the package reads.

Pure functions of the report's results, the JSON lines of steps.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

Result = dict[str, Any]

PEERS = (
    *("CCE", "CCE, all gradients", "Liger", "Liger SM90", "Liger SM100", "Liger scaled", "QuACK"),
    *("torch linear_cross_entropy", "TRL ChunkedLogProbFunction", "torch.compile", "eager"),
)
ENTRIES = 28  # of a row sampled at 2^-6: SmolLM2's on the demo's texts
FLAT_ENTRIES = 65  # where logits are flat and random, as the contests' are


class Goal(NamedTuple):
    """What is to be reached, what was measured, and whether that is enough."""

    goal: str
    measured: str
    verdict: str  # "met", "missed", "not measured", or "dry run"


def goals(results: list[Result], *, dry_run: bool) -> list[Goal]:
    """Each is judged where it is furthest from being reached."""
    gemm, copied = gemm_ceiling(results), copy_ceiling(results)
    clone_step = _shares_of_products(results, "mopo_loss")
    cut_forward = _shares(results, "linear_logprob_forward, cut", "flops", gemm)
    found = [
        _least("clone step ≥ 95% of the three products together", 0.95, clone_step),
        _least("cut forward ≥ 80% of the GEMM ceiling at 2·N·H·V", 0.80, cut_forward),
        _least("token_logprob ≥ 90% of copy bandwidth", 0.90, _shares(results, "token_logprob", "bytes", copied)),
        _label_statistics(results),
        _memory(results),
        _against_peers(results),
        _sampled_against_peers(results),
    ]
    return [Goal(goal.goal, "dry run", "dry run") for goal in found] if dry_run else found


def roofline_fraction(result: Result, results: list[Result]) -> float | None:
    """Floor over time; None where the time or a ceiling is missing."""
    gemm, copied = gemm_ceiling(results), copy_ceiling(results)
    if "seconds" not in result or gemm is None or copied is None:
        return None
    return max(result["flops"] / gemm, result["bytes"] / copied) / result["seconds"]


def gemm_ceiling(results: list[Result]) -> float | None:
    """The fastest product measured."""
    return max((r["flops_per_second"] for r in results if r["kind"] == "gemm"), default=None)


def copy_ceiling(results: list[Result]) -> float | None:
    return max((r["bytes_per_second"] for r in results if r["kind"] == "copy"), default=None)


def gradient_bytes(result: Result, itemsize: int = 2) -> int:
    """Gradients of hidden and weight as they are returned, and weight's as it is summed, in float32."""
    n, h, v = result["sizes"]
    return (n + v) * h * itemsize + v * h * 4


class SampledTerms(NamedTuple):
    """Seconds of a head's sum with sampled gradients, forward and backward, kernel by kernel; derived, not measured."""

    logits: float  # the one product
    folds: float  # logits written by it, read for the statistics, read for the samples
    grad_hidden: float  # a row of the weight read for each entry, the gradient written
    grad_weight: float  # a row of hidden read for each entry, the gradient written


def sampled_terms(
    sizes: tuple[int, int, int], gemm: float, copied: float, *, entries: float = ENTRIES, itemsize: int = 2
) -> SampledTerms:
    """At a GPU's rates of products and copies. Sorting the entries, some hundred bytes each, is left out."""
    n, h, v = sizes
    gathered = n * entries * h * itemsize
    return SampledTerms(
        logits=2.0 * n * h * v / gemm,
        folds=3.0 * n * v * itemsize / copied,
        grad_hidden=(gathered + n * h * itemsize) / copied,
        grad_weight=(gathered + v * h * itemsize) / copied,
    )


def fastest_peer(results: list[Result], sizes: list[int]) -> Result | None:
    """Of those that ran at these sizes."""
    times = (r for name in PEERS for r in _heads(results, name) if r["sizes"] == sizes)
    return min(times, key=lambda r: r["seconds"], default=None)


def rates_entry(results: list[Result]) -> dict[str, float] | None:
    """What gpu_rates.json holds of an architecture and dtype; None where something is missing."""
    best = best_blocks(results)
    rates = {
        "gemm": max((r["flops_per_second"] for r in results if r["kind"] == "products"), default=None),
        "copy": copy_ceiling(results),
        "cut_statistics": best.get("statistics", {}).get("flops_per_second"),
        "cut_gradients": best.get("gradients", {}).get("flops_per_second"),
    }
    measured = {name: float(rate) for name, rate in rates.items() if rate is not None}
    return measured if len(measured) == len(rates) else None


def best_blocks(results: list[Result]) -> dict[str, Result]:
    """The fastest result of each cut kernel."""
    best: dict[str, Result] = {}
    for result in results:
        if result["kind"] == "blocks" and "seconds" in result:
            other = best.get(result["kernel"])
            if other is None or result["seconds"] < other["seconds"]:
                best[result["kernel"]] = result
    return best


def with_blocks(table: dict[str, Any], architecture: str, dtype: str, results: list[Result]) -> dict[str, Any]:
    """cut_blocks.json with the fastest blocks of an architecture, which starts from the default where it is new."""
    table = copy.deepcopy(table)
    entry = table.setdefault(architecture, copy.deepcopy(table["default"]))
    for kernel, result in best_blocks(results).items():
        entry[dtype][kernel] = result["blocks"]
    return table


# ------------------------------------------------------------------------------------------------------------- goals


def _least(goal: str, wanted: float, shares: dict[str, float]) -> Goal:
    if not shares:
        return _not_measured(goal)
    worst, best = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    measured = f"{shares[worst]:.1%} at {worst}; at best {shares[best]:.1%} at {best}"
    return Goal(goal, measured, _met(shares[worst] >= wanted))


def _shares(results: list[Result], name: str, of: str, ceiling: float | None) -> dict[str, float]:
    """Of a ceiling, at every size: "flops" of the products', "bytes" of the copies'."""
    return {_at(r): r[of] / ceiling / r["seconds"] for r in _times(results, name)} if ceiling else {}


def _shares_of_products(results: list[Result], name: str) -> dict[str, float]:
    """Of the rate of an LM head's three products with nothing between them."""
    rates = {tuple(r["sizes"]): r["flops_per_second"] for r in results if r["kind"] == "products"}
    times = [r for r in _times(results, name) if tuple(r["sizes"][1:]) in rates]
    return {_at(r): r["flops"] / rates[tuple(r["sizes"][1:])] / r["seconds"] for r in times}


def _label_statistics(results: list[Result]) -> Goal:
    goal = "label_statistics: one launch, < 15 µs at B = 64"
    found = [r for r in results if r["kind"] == "launches" and "launches" in r]
    if not found:
        return _not_measured(goal)
    first = found[0]  # the table's first choice of those that run
    calls = [f"; the whole call {r['seconds'] * 1e6:.1f} µs" for r in _times(results, "label_statistics")]
    measured = f"{first['backend']}: {first['launches']:g} launches, {first['device_seconds'] * 1e6:.1f} µs"
    return Goal(goal, measured + "".join(calls), _met(first["launches"] == 1 and first["device_seconds"] < 15e-6))


def _memory(results: list[Result]) -> Goal:
    goal = "memory ≤ workspace + gradients, weight's summed in float32"
    workspace = next((r["workspace"] for r in results if r["kind"] == "environment"), None)
    extra = {
        f"{r['name']} at {_at(r)}": r["peak_bytes"] - gradient_bytes(r)
        for name in ("mopo_loss", "linear_logprob")
        for r in _times(results, name)
        if r["peak_bytes"] is not None
    }
    if not extra or workspace is None:
        return _not_measured(goal)
    worst = max(extra, key=extra.__getitem__)
    measured = f"{extra[worst] / 2**20:.0f} of {workspace / 2**20:.0f} MiB by {worst}"
    return Goal(goal, measured, _met(extra[worst] <= workspace))


def _against_peers(results: list[Result]) -> Goal:
    return _ratio_to_peers(results, "linear_logprob never slower than a peer", "linear_logprob", 1.0)


def _sampled_against_peers(results: list[Result]) -> Goal:
    goal = "sampled ≤ 0.5 × the fastest peer's time"
    return _ratio_to_peers(results, goal, "linear_logprob_sampled", 0.5)


def _ratio_to_peers(results: list[Result], goal: str, name: str, most: float) -> Goal:
    """Our time over that of the fastest peer, at the size where it is largest."""
    ratios = {
        f"{peer['name']} at {_at(peer)}": r["seconds"] / peer["seconds"]
        for r in _times(results, name)
        if (peer := fastest_peer(results, r["sizes"])) is not None
    }
    if not ratios:
        return _not_measured(goal)
    worst = max(ratios, key=ratios.__getitem__)
    absent = [peer for peer in PEERS if not _heads(results, peer)]
    measured = f"{ratios[worst]:.2f} × the time of {worst}" + f"; without {', '.join(absent)}" * bool(absent)
    return Goal(goal, measured, _met(ratios[worst] <= most))


def _times(results: Iterable[Result], name: str) -> list[Result]:
    return [r for r in results if r["kind"] == "time" and r["name"] == name and "seconds" in r]


def _heads(results: Iterable[Result], name: str) -> list[Result]:
    """Of a peer, which may have been timed at another workload too."""
    return [r for r in _times(results, name) if r["workload"] == "linear_logprob"]


def _at(result: Result) -> str:
    return "N={} H={} V={}".format(*result["sizes"])


def _met(reached: bool) -> str:
    return "met" if reached else "missed"


def _not_measured(goal: str) -> Goal:
    return Goal(goal, "", "not measured")
