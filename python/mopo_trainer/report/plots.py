"""Figures of the command line: drawn without a display, written to a temporary name and renamed.

Everything takes plain sequences or numpy arrays and returns a `matplotlib.figure.Figure`; `save_figure` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import moocore
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from mopo_trainer.files import atomic_path

# Okabe and Ito's eight colours, distinguishable by readers with any colour vision; the primary is always the first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def save_figure(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as PNG (or whatever the suffix says) so that `path` is never half written; returns `path`."""
    path = Path(path)
    with atomic_path(path) as temporary:
        fig.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    return path


def new_figure(width: float, height: float) -> Figure:
    fig = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def _tidy(ax: Axes, *, title: str | None = None, xlabel: str | None = None, ylabel: str | None = None) -> None:
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, fontsize=10, loc="left")
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)


def _outside_legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """One legend below all panels, each label once."""
    columns = int(fig.get_figwidth() // 1.9)
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        fig.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=9,
        )


def plot_costs(sweeps: Sequence[Mapping[str, Any]], primary: str, *, subtitle: str = "") -> Figure:
    """What a threshold costs: one line per secondary, its threshold moved while the others stay where they are.

    sweeps: one mapping per secondary with `objective`, `thresholds`, `primary` (the primary's win rate at each
    threshold), `multipliers`, and `chosen`: None or (threshold, primary's win rate, multiplier) of the user's choice.
    """
    fig = new_figure(9.5, 4.9)
    cost, price = fig.subplots(1, 2)
    for i, sweep in enumerate(sweeps, start=1):
        style = {"color": color(i), "linewidth": 1.8}
        cost.plot(sweep["thresholds"], sweep["primary"], label=sweep["objective"], **style)
        price.plot(sweep["thresholds"], sweep["multipliers"], **style)
        if sweep["chosen"] is not None:
            threshold, win_rate, multiplier = sweep["chosen"]
            point = {"color": color(i), "marker": "o", "markersize": 8, "markeredgecolor": "white", "zorder": 5}
            cost.plot([threshold], [win_rate], **point)
            price.plot([threshold], [multiplier], **point)
    if any(sweep["chosen"] is not None for sweep in sweeps):
        cost.plot([], [], "o", color="0.4", markeredgecolor="white", markersize=8, label="chosen threshold")
    _tidy(cost, title="What each threshold costs", xlabel="threshold on the secondary (win rate)")
    cost.set_ylabel(f"win rate of {primary} (primary)")
    _tidy(price, title="Multiplier: the price at the margin", xlabel="threshold on the secondary (win rate)")
    price.set_ylabel("multiplier λ")
    # Multipliers run away near the best attainable threshold: linear to 1, logarithmic above, shows both in one panel.
    price.set_yscale("asinh", linear_width=1.0)
    price.set_ylim(bottom=0.0)
    price.set_yticks([t for t in (0, 0.5, 1, 2, 5, 10, 100, 1000) if t <= max(1.0, price.get_ylim()[1])])
    price.yaxis.set_major_formatter("{x:g}")
    price.minorticks_off()
    if subtitle:
        fig.suptitle(subtitle, fontsize=10, x=0.01, ha="left")
    _outside_legend(fig, [cost])
    return fig


def plot_front(
    points: ArrayLike,  # [M, K] win rates
    objectives: Sequence[str],
    *,
    candidates: ArrayLike | None = None,  # [Y, K] single responses, drawn in grey with their mixtures
    candidate_names: Sequence[str] = (),
    marked: Mapping[str, tuple[ArrayLike, ArrayLike | None]] | None = None,
    thresholds: Mapping[str, float] | None = None,
    subtitle: str = "",
) -> Figure:
    """Pareto front, one panel per pair of `panel_pairs`; the line joins the points that this pair makes non-dominated.

    marked: named points to compare with the front, as (values [K], half widths of their intervals [K] or None).
    """
    points = np.asarray(points, dtype=float)
    pairs = panel_pairs(len(objectives))
    columns = min(3, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    fig = new_figure(max(6.4, 3.9 * columns), 0.9 + (4.2 if len(pairs) == 1 else 3.4) * rows)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, (i, j) in zip(axes, pairs, strict=False):
        if candidates is not None:
            _draw_candidates(ax, np.asarray(candidates, dtype=float)[:, [i, j]], candidate_names)
        _draw_front(ax, points[:, [i, j]])
        for m, (label, (values, half)) in enumerate((marked or {}).items(), start=1):
            x, y = np.asarray(values, dtype=float)[[i, j]]
            error = None if half is None else np.asarray(half, dtype=float)
            ax.errorbar(
                [x],
                [y],
                xerr=None if error is None else error[i],
                yerr=None if error is None else error[j],
                fmt=MARKERS[m % len(MARKERS)],
                color=color(m),
                markeredgecolor="white",
                markersize=9,
                capsize=3,
                zorder=6,
                label=label,
            )
        for name, value in (thresholds or {}).items():
            line = {"color": "0.35", "linestyle": "--", "linewidth": 1.2, "label": "threshold"}
            if name == objectives[i]:
                ax.axvline(value, **line)
            elif name == objectives[j]:
                ax.axhline(value, **line)
        _tidy(ax, xlabel=f"win rate of {objectives[i]}", ylabel=f"win rate of {objectives[j]}")
    for ax in axes[len(pairs) :]:
        ax.set_axis_off()
    if subtitle:
        fig.suptitle(subtitle, fontsize=10, x=0.01, ha="left")
    _outside_legend(fig, list(axes))
    return fig


def panel_pairs(num_objectives: int) -> list[tuple[int, int]]:
    """The pairs of objectives worth a panel: all up to four objectives, beyond that each secondary with the primary."""
    if num_objectives > 4:
        return [(0, k) for k in range(1, num_objectives)]
    return list(combinations(range(num_objectives), 2))


def _draw_candidates(ax: Axes, candidates: NDArray[np.float64], names: Sequence[str]) -> None:
    ax.plot(candidates[:, 0], candidates[:, 1], "x", color="0.45", markersize=7, label="single response", zorder=2)
    for name, (x, y) in zip(names, candidates, strict=False):
        ax.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color="0.35")
    hull = _concave_front(candidates)
    ax.plot(hull[:, 0], hull[:, 1], ":", color="0.45", linewidth=1.2, label="front as τ → 0", zorder=1)
    ax.margins(0.12)


def _concave_front(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mixtures of points [Y, 2] that nothing dominates: corners of the upper right of their convex hull."""
    corners: list[NDArray[np.float64]] = []
    best = moocore.is_nondominated(points, maximise=True)
    for point in sorted(points[best], key=lambda p: p[0]):
        while len(corners) > 1 and np.linalg.det([corners[-1] - corners[-2], point - corners[-2]]) >= 0:
            corners.pop()
        corners.append(point)
    return np.array(corners)


def _draw_front(ax: Axes, pair: NDArray[np.float64]) -> None:
    best = moocore.is_nondominated(pair, maximise=True, keep_weakly=True)
    front = pair[best][np.argsort(pair[best][:, 0])]
    if not best.all():
        ax.plot(pair[~best, 0], pair[~best, 1], ".", color="0.7", markersize=4, label="other solutions", zorder=3)
    ax.plot(front[:, 0], front[:, 1], "-o", color=color(0), markersize=3.5, linewidth=1.4, label="front", zorder=4)


def plot_training(
    log_history: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, objectives: Sequence[str]
) -> Figure:
    """Training curves: loss, the target's win rates, multipliers, held-out win rates; saved if `path` is given.

    log_history: as `transformers.Trainer` keeps it, with the keys that MOPOTrainer logs: `loss`, `win_rate/NAME`,
    `threshold/NAME`, `multiplier/NAME`, `tokens_per_second`, `eval_loss`, `eval_win_rate/NAME`.
    objectives: the primary first.
    """
    held_out = any(key.startswith("eval_win_rate/") for row in log_history for key in row)
    fig = new_figure(10.0, 7.0)
    loss, target, multipliers, last = fig.subplots(2, 2).ravel()
    _draw_series(loss, log_history, "loss", color=color(0), label="training")
    _draw_series(loss, log_history, "eval_loss", color=color(1), marker="o", label="held out")
    _tidy(loss, title="Loss", ylabel="loss (nats per prompt)")
    if len(loss.get_lines()) > 1:
        loss.legend(frameon=False, fontsize=8)
    for i, name in enumerate(objectives):
        label = f"{name} (primary)" if i == 0 else name
        _draw_series(target, log_history, f"win_rate/{name}", color=color(i), label=label)
        for ax in (target, last) if held_out else (target,):
            _draw_series(ax, log_history, f"threshold/{name}", color=color(i), linestyle="--", linewidth=1.1)
        if i:
            _draw_series(multipliers, log_history, f"multiplier/{name}", color=color(i))
        _draw_series(last, log_history, f"eval_win_rate/{name}", color=color(i), marker="o")
    _tidy(target, title="Win rates of the target, per batch (dashed: threshold)", ylabel="win rate")
    _tidy(multipliers, title="Multipliers", ylabel="multiplier λ")
    multipliers.set_ylim(bottom=0.0)
    if held_out:
        _tidy(last, title="Held-out win rates that the model's log-probs imply", ylabel="win rate")
    else:
        _draw_series(last, log_history, "tokens_per_second", color=color(0))
        _tidy(last, title="Speed", ylabel="tokens per second")
        last.set_ylim(bottom=0.0)
    for ax in (loss, target, multipliers, last):
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _outside_legend(fig, [target])
    if path is not None:
        save_figure(fig, path)
    return fig


def _draw_series(ax: Axes, log_history: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    rows = [(row["step"], row[key]) for row in log_history if key in row]
    if rows:
        ax.plot(*zip(*rows, strict=True), **{"linewidth": 1.6, "markersize": 4, **style})
