"""pytest-benchmark's JSON as a Markdown table and plots:

    make bench                                             does both steps, into runs/bench
    python bench/report.py results.json … bench/results/cpu

Per group: median seconds, and medians over the rounds of the ratios within a round: time against the first contestant,
and the products alone (the block sizes of best median) against it. Memory is the peak above the start, outputs and
gradients included, of what torch allocates (what the vendor's GEMM packs is not in it); malloc kept what was freed, so
that nobody waits for the kernel's pages. A contestant whose warm-up took more than half a minute was not run again: its
one time stands (torch.compile's then has the compilation in it).
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median

import matplotlib
from bench_head import CEILING
from matplotlib import pyplot as plt

matplotlib.use("Agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("output", type=Path, help="directory for report.md and the plots")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    options.output.mkdir(parents=True, exist_ok=True)
    lines = heading(results)
    entries = [entry for result in results for entry in result["benchmarks"]]
    scaling = [entry for entry in entries if "axis" in entry["extra_info"]]
    contests = [entry for entry in entries if entry not in scaling and "seconds" in entry["extra_info"]]
    alone = [entry for entry in entries if "seconds" not in entry["extra_info"]]
    if contests:
        plot_contests(contests, options.output / "contests.png")
        lines += ["", "![time and memory of every contestant](contests.png)"]
    for entry in contests:
        lines += table(entry)
    if scaling:
        plot_scaling(scaling, options.output / "scaling.png")
        lines += ["", "![time and memory against rows, vocabulary and the share of rows that count](scaling.png)"]
    if alone:
        lines += ["", "## without peers", "", "| | seconds |", "|---|---|"]
        lines += [f"| {entry['name']} | {entry['stats']['median']:.3f} |" for entry in alone]
    (options.output / "report.md").write_text("\n".join(lines) + "\n")


def heading(results: list[dict]) -> list[str]:
    cpu, dates = results[0]["machine_info"]["cpu"], sorted(result["datetime"][:16] for result in results)
    return [f"# Benchmarks\n\n{cpu['brand_raw']}, {cpu['count']} cores, {dates[0]} to {dates[-1]}."]


def table(entry: dict) -> list[str]:
    info = entry["extra_info"]
    seconds = info["seconds"]
    names, ceiling = contestants(seconds)
    rows = [
        f"\n## {info['group']}\n",
        "| | seconds | × ours | of the products alone | extra memory, MB |",
        "|---|---|---|---|---|",
    ]
    for name in [*names, *([ceiling] if ceiling else [])]:
        against_ours = ratio(seconds[name], seconds[names[0]])
        share = f"{ratio(seconds[ceiling], seconds[name]):.1%}" if ceiling else ""
        memory = info["peak_bytes"][name] / 1e6
        rows.append(f"| {name} | {median(seconds[name]):.3f} | {against_ours:.2f} | {share} | {memory:.0f} |")
    return rows


def ratio(times: list[float], others: list[float]) -> float:
    if len(times) != len(others):  # one of the two was run once
        return median(times) / median(others)
    return median(a / b for a, b in zip(times, others, strict=True))


def plot_contests(entries: list[dict], path: Path) -> None:
    bars = [sum(not name.startswith(CEILING) for name in entry["extra_info"]["seconds"]) + 1 for entry in entries]
    figure, grid = plt.subplots(
        *(len(entries), 2),
        figsize=(12, 0.6 * len(entries) + 0.25 * sum(bars)),
        squeeze=False,
        sharey="row",
        height_ratios=bars,
        constrained_layout=True,
    )
    for (time, memory), entry in zip(grid, entries, strict=True):
        info = entry["extra_info"]
        names, ceiling = contestants(info["seconds"])
        seconds = [median(info["seconds"][name]) for name in names]
        colors = ["tab:blue" if name.startswith("mopo") else "tab:gray" for name in names]
        time.barh(names, seconds, color=colors)
        memory.barh(names, [info["peak_bytes"][name] / 1e6 for name in names], color=colors)
        if ceiling:
            time.axvline(median(info["seconds"][ceiling]), color="black", linestyle=":", label=CEILING)
            time.legend(fontsize="small")
        time.invert_yaxis()
        time.set_title(f"{info['group']}: seconds", fontsize="medium", loc="left")
        memory.set_title("extra memory, MB", fontsize="medium", loc="left")
    figure.savefig(path, dpi=120)


def contestants(seconds: dict) -> tuple[list[str], str | None]:
    """Names of all but the products alone, and of the fastest of those."""
    products = [name for name in seconds if name.startswith(CEILING)]
    ceiling = min(products, key=lambda name: median(seconds[name]), default=None)
    return [name for name in seconds if name not in products], ceiling


def plot_scaling(entries: list[dict], path: Path) -> None:
    axes_of = {"rows": "N", "vocabulary": "V", "share of rows that count": "share"}
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", constrained_layout=True)
    for column, (axis, field) in enumerate(axes_of.items()):
        curves = defaultdict(list)
        for entry in entries:
            info = entry["extra_info"]
            if info["axis"] != axis:
                continue
            for name, seconds in info["seconds"].items():
                curves[name].append((info[field], median(seconds), info["peak_bytes"][name] / 1e6))
        for name, points in curves.items():
            x, seconds, memory = zip(*sorted(points), strict=True)
            grid[0, column].plot(x, seconds, "o-", label=name)
            grid[1, column].plot(x, memory, "o-", label=name)
        grid[1, column].set_xlabel(axis)
    grid[0, 0].set_ylabel("seconds, forward and backward")
    grid[1, 0].set_ylabel("extra memory, MB")
    grid[0, 0].legend(fontsize="small")
    for cell in grid.flat:
        cell.set_ylim(bottom=0)
        cell.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
