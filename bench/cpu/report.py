"""Benchmarks' JSON as a Markdown table and plots:

    make bench                                                       does both steps, into runs/bench
    python -m bench.cpu.report results.json … bench/results/cpu

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
from matplotlib import pyplot as plt

from bench.cpu.head import CEILING

matplotlib.use("Agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("output", type=Path, help="directory for report.md and the plots")
    options = parser.parse_args()
    write([json.loads(path.read_text()) for path in options.results], options.output)


def write(results: list[dict], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    infos = [entry["extra_info"] for result in results for entry in result["benchmarks"]]
    scaling = [info for info in infos if "axis" in info]
    contests = [info for info in infos if "axis" not in info and len(info["seconds"]) > 1]
    alone = [info for info in infos if len(info["seconds"]) == 1]
    lines = heading(results)
    if contests:
        plot_contests(contests, output / "contests.png")
        lines += ["", "![time and memory of every contestant](contests.png)"]
    for info in contests:
        lines += table(info)
    if scaling:
        plot_scaling(scaling, output / "scaling.png")
        lines += ["", "![time and memory against rows, vocabulary and the share of rows that count](scaling.png)"]
    if alone:
        lines += ["", "## without peers", "", "| | seconds |", "|---|---|"]
        lines += [f"| {info['group']} | {median(*info['seconds'].values()):.3f} |" for info in alone]
    (output / "report.md").write_text("\n".join(lines) + "\n")


def heading(results: list[dict]) -> list[str]:
    cpu, dates = results[0]["machine_info"]["cpu"], sorted(result["datetime"][:16] for result in results)
    return [f"# Benchmarks\n\n{cpu['brand_raw']}, {cpu['count']} cores, {dates[0]} to {dates[-1]}."]


def table(info: dict) -> list[str]:
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
    return rows + [f"| {name} | {error} | | | |" for name, error in info.get("errors", {}).items()]


def ratio(times: list[float], others: list[float]) -> float:
    if len(times) != len(others):  # one of the two was run once
        return median(times) / median(others)
    return median(a / b for a, b in zip(times, others, strict=True))


def plot_contests(infos: list[dict], path: Path) -> None:
    bars = [len(contestants(info["seconds"])[0]) + 1 for info in infos]
    figure, grid = plt.subplots(
        nrows=len(infos),
        ncols=2,
        figsize=(12, 0.6 * len(infos) + 0.25 * sum(bars)),
        squeeze=False,
        sharey="row",
        height_ratios=bars,
        constrained_layout=True,
    )
    for (time, memory), info in zip(grid, infos, strict=True):
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


def plot_scaling(infos: list[dict], path: Path) -> None:
    axes_of = {"rows": "N", "vocabulary": "V", "share of rows that count": "share"}
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", constrained_layout=True)
    for column, (axis, field) in enumerate(axes_of.items()):
        curves = defaultdict(list)
        for info in (info for info in infos if info["axis"] == axis):
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
