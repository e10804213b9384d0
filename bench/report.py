"""pytest-benchmark's JSON as a Markdown table and plots:

    make bench                                        (or pytest bench … --benchmark-json results.json)
    python bench/report.py results.json bench/results

Per group: the fastest round, the time against the group's first `mopo` entry, arithmetic as a share of the products
alone (the fastest `bench_products_alone` of the group), and the peak of extra memory. Rounds are compared by their
minimum, which other work on the machine disturbs least.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("Agg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path, help="directory for report.md and the plots")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    options.output.mkdir(parents=True, exist_ok=True)
    groups = defaultdict(list)
    for entry in results["benchmarks"]:
        groups[entry["group"]].append(entry)
    lines = [heading(results)]
    scaling = [entry for entry in results["benchmarks"] if "axis" in entry["extra_info"]]
    for group, entries in groups.items():
        if "axis" not in entries[0]["extra_info"]:
            lines += table(group, entries)
    if scaling:
        plot_scaling(scaling, options.output / "scaling.png")
        lines += ["", "![time and memory against rows, vocabulary and the share of rows that count](scaling.png)"]
    (options.output / "report.md").write_text("\n".join(lines) + "\n")


def heading(results: dict) -> str:
    cpu = results["machine_info"]["cpu"]
    return f"# Benchmarks\n\n{cpu['brand_raw']}, {cpu['count']} cores, {results['datetime'][:16]}."


def table(group: str, entries: list[dict]) -> list[str]:
    products = [e for e in entries if "products_alone" in e["name"]]
    ceiling = min((e["stats"]["min"] for e in products), default=None)
    others = [e for e in entries if e not in products]
    ours = others[0]["stats"]["min"]
    rows = [
        f"\n## {group}\n",
        "| | seconds | × ours | of the products alone | extra memory, MB |",
        "|---|---|---|---|---|",
    ]
    if ceiling is not None:
        rows.append(f"| *the three products alone, best blocks* | {ceiling:.3f} | {ceiling / ours:.2f} | 100% | |")
    for entry in others:
        seconds = entry["stats"]["min"]
        share = "" if ceiling is None else f"{ceiling / seconds:.0%}"
        memory = entry["extra_info"]["peak_bytes"] / 1e6
        rows.append(f"| {label(entry)} | {seconds:.3f} | {seconds / ours:.2f} | {share} | {memory:.0f} |")
    return rows


def label(entry: dict) -> str:
    return entry["params"]["name"]


def plot_scaling(entries: list[dict], path: Path) -> None:
    axes_of = {"rows": "N", "vocabulary": "V", "share of rows that count": "share"}
    figure, grid = plt.subplots(2, 3, figsize=(12, 6.5), sharex="col", constrained_layout=True)
    for column, (axis, field) in enumerate(axes_of.items()):
        curves = defaultdict(list)
        for entry in entries:
            info = entry["extra_info"]
            if info["axis"] == axis:
                curves[info["name"]].append((info[field], entry["stats"]["min"], info["peak_bytes"] / 1e6))
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
