"""pytest-benchmark's JSON as a Markdown table and plots:

    make bench                                        (or pytest bench … --benchmark-json results.json)
    python bench/report.py results.json bench/results

Per group: median seconds, and medians over the rounds of the ratios within a round: time against the first contestant,
and the products alone (the block sizes of best median) against it. Memory is the peak above the start, outputs and
gradients included.
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
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path, help="directory for report.md and the plots")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    lines = [heading(results)]
    scaling = [entry for entry in results["benchmarks"] if "axis" in entry["extra_info"]]
    for entry in results["benchmarks"]:
        if entry not in scaling:
            lines += table(entry)
    if scaling:
        plot_scaling(scaling, options.output / "scaling.png")
        lines += ["", "![time and memory against rows, vocabulary and the share of rows that count](scaling.png)"]
    (options.output / "report.md").write_text("\n".join(lines) + "\n")


def heading(results: dict) -> str:
    cpu = results["machine_info"]["cpu"]
    return f"# Benchmarks\n\n{cpu['brand_raw']}, {cpu['count']} cores, {results['datetime'][:16]}."


def table(entry: dict) -> list[str]:
    info = entry["extra_info"]
    seconds = info["seconds"]
    products = [name for name in seconds if name.startswith(CEILING)]
    ceiling = min(products, key=lambda name: median(seconds[name]), default=None)
    names = [name for name in seconds if name not in products]
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
    return median(a / b for a, b in zip(times, others, strict=True))


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
