"""How far labels can be trusted before any training: whether objectives conflict, how sure a target's win rates are.

The target's win rate on prompt x is Σ_i w_i v_ik over the prompt's responses, and G_k is its mean over the prompts that
objective k labels. Its interval is a bootstrap over prompts: what the same multipliers would give on other prompts of
the kind. Labels that are single draws bend it further: a target that picks the best of few noisy labels picks luck too,
which no resampling of prompts shows.
"""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from mopo_kernels import mopo_weights
from mopo_trainer.report.evaluate import Interval, bootstrap_interval

MAX_DRAWS = 50_000_000  # resamples × prompts: a second or so


def rank_correlations(win_rate: Tensor) -> list[list[float | None]]:  # [M, K] -> [K][K]
    """Spearman's rank correlations over the responses that both objectives label; None where one is constant there."""
    table = pd.DataFrame(win_rate.numpy()).corr("spearman")
    return table.astype(object).where(table.notna(), None).to_numpy().tolist()


def against_fresh_texts(win_rate: float, group_size: int) -> float:
    """What a win rate within groups is against new texts of the same writer, where comparisons are sure and rarely tie.

    Who beats k of the n − 1 others of a group, and no more is known, beats a new text with probability (k + 1)/(n + 1).
    """
    return ((group_size - 1) * win_rate + 1) / (group_size + 1)


def within_group(win_rate: float, group_size: int) -> float:
    """The win rate within groups that is `win_rate` against new texts; above 1 where no group of this size shows it."""
    return ((group_size + 1) * win_rate - 1) / (group_size - 1)


def worth_of_threshold(objective: str, bound: float, group_size: int) -> str:
    """What a threshold within groups is worth against new texts, and what to ask of the labels to get it there."""
    needed = within_group(bound, group_size)
    worth = f"{objective} {bound:g} among {group_size} responses is about {against_fresh_texts(bound, group_size):.2f}"
    ask = f"ask {needed:.2f}" if needed < 1 else f"no threshold of groups of {group_size} is enough"
    return f"{worth} against fresh texts; to hold {bound:g} there too, {ask}."


def usual_size(group: Tensor) -> int:  # [M]
    """The median number of responses to a prompt."""
    return int(group.unique(return_counts=True)[1].median())


def are_sure(win_rate: Tensor, group: Tensor) -> bool:  # [M], NaN = unlabelled; [M]
    """Whether win rates are counts of comparisons that are 0 or 1, with ties among at most a tenth of the responses."""
    others = (group.unique(return_inverse=True, return_counts=True)[2] - 1)[group.unique(return_inverse=True)[1]]
    wins = (win_rate * others)[~win_rate.isnan()]
    return bool(((wins - wins.round()).abs() < 1e-6).double().mean() >= 0.9)


def prompt_win_rates(
    win_rate: Tensor,  # [M, K], NaN = unlabelled
    group: Tensor,  # [M]
    multipliers: Tensor,  # [K]
    tau: float,
) -> Tensor:  # [G, K]
    """The target's win rates on every prompt, NaN where it is unlabelled; their means over prompts are the G_k."""
    weights = mopo_weights(win_rate, group, multipliers, tau=tau)
    slot = group.unique(return_inverse=True)[1]
    sums = win_rate.new_zeros(int(slot.max()) + 1, win_rate.shape[1])
    labelled = sums.index_add(0, slot, (~win_rate.isnan()).double()) > 0
    rates = sums.index_add(0, slot, weights[:, None] * win_rate.nan_to_num(nan=0.5))  # ½: as the target counts them
    return rates.where(labelled, torch.nan)


def intervals_over_prompts(rates: Tensor) -> list[Interval]:  # [G, K] -> [K]
    """95% intervals of the means over prompts, NaN left out."""
    resamples = max(200, min(2000, MAX_DRAWS // len(rates)))
    return [bootstrap_interval(column, resamples=resamples) for column in rates.T.numpy()]
