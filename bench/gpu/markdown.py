"""The GPU report's JSON as Markdown."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from bench.gpu.verdict import (
    FLAT_ENTRIES,
    best_blocks,
    copy_ceiling,
    fastest_peer,
    gemm_ceiling,
    gradient_bytes,
    roofline_fraction,
    sampled_terms,
)

Table = list[list[str]]


def markdown(report: dict[str, Any]) -> str:
    results = [result for step in report["steps"] for result in step["results"]]
    sections = [
        _heading(report, results),
        "## Goals",
        _table([["goal", "measured", "verdict"], *([*goal] for goal in report["goals"])]),
        "## Steps",
        _table([["step", "state", "seconds", ""], *map(_step, report["steps"])]),
        "## Ceilings",
        _table([["", "rate"], *_ceilings(results)]),
        "## Times",
        *_times(results),
        "## Sampled gradients",
        _table([["N, H, V", "ms", "derived", "exact", "fastest peer", ""], *_sampled(results)]),
        "## Label statistics",
        _table([["backend", "launches", "µs on the device"], *_launches(results)]),
        "## Block sizes of the cut kernels",
        _table([["kernel", "blocks", "ms", "TFLOP/s", ""], *_blocks(results)]),
        *_outputs(report["steps"]),
    ]
    return "\n\n".join(sections) + "\n"


def _heading(report: dict[str, Any], results: list[dict[str, Any]]) -> str:
    lines = []
    if report["dry_run"]:
        lines += ["# GPU report: dry run", "Tiny CPU tensors, Triton interpreted: this shows that the script works."]
        lines += ["**Nothing below is a measurement of a GPU.**"]
    else:
        lines += [f"# GPU report: {report['gpu']}"]
    lines += [f"{report['started']}, {report['seconds']:.0f} of {report['minutes'] * 60:.0f} seconds."]
    for found in results:
        if found["kind"] == "environment":
            packages = [f"{name} {version}" for name, version in found["packages"].items()]
            lines.append(", ".join([*packages, f"CUDA {found['cuda']}"]) + ".")
            lines.append("\n".join(f"- {op}: {backend}" for op, backend in found["backends"].items()))
    return "\n\n".join(lines)


def _step(step: dict[str, Any]) -> list[str]:
    return [step["name"], step["state"], f"{step['seconds']:.0f}", step["error"]]


def _ceilings(results: list[dict[str, Any]]) -> Table:
    rows = [["copy, read and written", _rate(r["bytes_per_second"], "B/s")] for r in results if r["kind"] == "copy"]
    rows += [[f"product: {r['name']}", _rate(r["flops_per_second"], "FLOP/s")] for r in results if r["kind"] == "gemm"]
    rows += [
        ["three products together, H={} V={}".format(*r["sizes"]), _rate(r["flops_per_second"], "FLOP/s")]
        for r in results
        if r["kind"] == "products"
    ]
    return rows


def _times(results: list[dict[str, Any]]) -> list[str]:
    sections = []
    header = ["", "op", "ms", "of the roofline", "extra memory, MiB", "without gradients, MiB", ""]
    times = [result for result in results if result["kind"] == "time"]
    for sizes, group in groupby(times, lambda result: result["sizes"]):
        rows = [
            [
                r["name"],
                r["workload"],
                _milliseconds(r.get("seconds")),
                _percent(roofline_fraction(r, results)),
                *_memory(r),
                r.get("error", ""),
            ]
            for r in group
        ]
        n, h, v = sizes
        sections += [f"### N = {n}" + (f", H = {h}, V = {v}" if v > 1 else ""), _table([header, *rows])]
    return sections or ["Nothing was timed."]


def _sampled(results: list[dict[str, Any]]) -> Table:
    """linear_logprob's sum: sampled as measured, as derived from the ceilings, exact, and the fastest peer."""
    gemm, copied, rows = gemm_ceiling(results), copy_ceiling(results), []
    times = {(r["name"], *r["sizes"]): r.get("seconds") for r in results if r["kind"] == "time"}
    for (name, *sizes), seconds in times.items():
        if name == "linear_logprob_sampled":
            terms = sampled_terms(tuple(sizes), gemm, copied, entries=FLAT_ENTRIES) if gemm and copied else ()
            peer = fastest_peer(results, sizes)
            found = [seconds, sum(terms) or None, times.get(("linear_logprob", *sizes)), peer and peer["seconds"]]
            rows.append([", ".join(map(str, sizes)), *map(_milliseconds, found), peer["name"] if peer else ""])
    return rows


def _memory(result: dict[str, Any]) -> list[str]:
    peak = result.get("peak_bytes")
    if peak is None:
        return ["", ""]
    has_both = result["workload"] in ("mopo_loss", "linear_logprob")
    return [f"{peak / 2**20:.0f}", f"{(peak - gradient_bytes(result)) / 2**20:.0f}" if has_both else ""]


def _launches(results: list[dict[str, Any]]) -> Table:
    return [
        [r["backend"], r["error"], ""]
        if "error" in r
        else [r["backend"], f"{r['launches']:g}", f"{r['device_seconds'] * 1e6:.1f}"]
        for r in results
        if r["kind"] == "launches"
    ]


def _blocks(results: list[dict[str, Any]]) -> Table:
    best = best_blocks(results).values()
    rows = []
    for r in results:
        if r["kind"] == "blocks":
            notes = ["the table's"] * r["current"] + ["**fastest**"] * (r in best)
            notes += [r["error"]] if "error" in r else []
            speed = f"{r['flops_per_second'] / 1e12:.0f}" if "seconds" in r else ""
            blocks = " × ".join(str(r["blocks"][name]) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_H"))
            blocks += f", {r['blocks']['num_warps']} warps, {r['blocks']['num_stages']} stages"
            rows.append([r["kernel"], blocks, _milliseconds(r.get("seconds")), speed, ", ".join(notes)])
    return rows


def _outputs(steps: list[dict[str, Any]]) -> list[str]:
    """What steps printed that have no results of their own, and steps that failed."""
    return [
        f"## Output of {step['name']}\n\n```\n{step['output'].strip()}\n```"
        for step in steps
        if step["output"].strip() and (not step["results"] or step["error"])
    ]


def _table(rows: Table) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _rate(rate: float, unit: str) -> str:
    return f"{rate / 1e12:.3g} T{unit}"
