"""Held-out sets: reading them, their metrics' names, and what the policy's log-probs say about their labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from mopo_kernels import MOPODual, mopo_objective
from mopo_trainer.data import labels
from mopo_trainer.data.sources import DataError
from mopo_trainer.data.tokens import TokenizedGroups
from mopo_trainer.names import it_has
from mopo_trainer.report.evaluate import label_win_rates
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.datasets import read_groups, tokenize

logger = logging.getLogger(__name__)

EvalGroups = TokenizedGroups | dict[str, TokenizedGroups]  # a dict holds several sets by name

KINDS = ("win_rate", "agreement")


def read_eval_groups(source: Any, names: Sequence[str], tokenizer: Any, args: MOPOConfig) -> EvalGroups:
    """One held-out set, or {name: set} of a dict or DatasetDict.

    Raises:
        DataError: an empty dict, rows that cannot be read, a set without a label for any of `names`.
    """
    if not isinstance(source, Mapping):
        return _read_set(source, "eval_dataset", names, tokenizer, args)
    if not source:
        raise DataError("eval_dataset is an empty dict; give {name: rows}, or None")
    return {name: _read_set(rows, f"eval_dataset[{name!r}]", names, tokenizer, args) for name, rows in source.items()}


def _read_set(source: Any, argument: str, names: Sequence[str], tokenizer: Any, args: MOPOConfig) -> TokenizedGroups:
    """A set need not carry every objective: those that it lacks are not measured on it, which is said."""
    groups = read_groups(source, argument, args, split="test")
    carried = [name for name in names if _is_labelled(groups, name)]
    if not carried:
        raise DataError(f"{argument} has labels for none of the objectives {', '.join(names)}")
    if len(carried) < len(names):
        lacking = ", ".join(name for name in names if name not in carried)
        logger.warning("%s has no labels for %s: not measured there", argument, lacking)
    tokens = tokenize(groups, carried, tokenizer, args)
    win_rate = torch.full((len(tokens.group), len(names)), torch.nan, dtype=torch.float64)
    win_rate[:, [names.index(name) for name in carried]] = tokens.win_rate
    return replace(tokens, win_rate=win_rate)


def _is_labelled(groups: Dataset, name: str) -> bool:
    try:
        return bool(labels(groups, [name]))
    except DataError:
        return False


def datasets_of(groups: EvalGroups | None) -> Dataset | dict[str, Dataset] | None:
    """What transformers.Trainer keeps as its eval_dataset."""
    if isinstance(groups, Mapping):
        return {name: one.dataset for name, one in groups.items()}
    return None if groups is None else groups.dataset


def by_prefix(groups: EvalGroups | None, prefix: str) -> dict[str, TokenizedGroups]:
    """{prefix of the metrics' names: groups}, as transformers.Trainer forms it: eval, or eval_NAME of several sets."""
    if isinstance(groups, Mapping):
        return {f"{prefix}_{name}": one for name, one in groups.items()}
    return {} if groups is None else {prefix: groups}


def eval_metrics(
    groups: TokenizedGroups,
    logp: Tensor,  # [M]
    reference: Tensor,  # [M]
    *,
    dual: MOPODual,
    args: MOPOConfig,
    prefix: str,
) -> dict[str, float]:
    """{prefix}_loss under the multipliers in force; {prefix}_win_rate/NAME and {prefix}_agreement/NAME of the
    objectives that the set carries labels for."""
    output = mopo_objective(
        logp,
        groups.win_rate,
        groups.group,
        dual.multipliers,
        tau=args.tau,
        ref_logp=reference,
        policy_step=args.policy_step,
    )
    metrics = {f"{prefix}_loss": output.loss.item()}
    labelled = _labelled(groups)
    names = [name for name, kept in zip(dual.objectives, labelled.tolist(), strict=True) if kept]
    implied = label_win_rates(logp, reference, groups.win_rate[:, labelled], groups.group, names)
    for name, found in implied.items():
        metrics[f"{prefix}_win_rate/{name}"] = found["win_rate"].mean
        if found["agreement"] is not None:
            metrics[f"{prefix}_agreement/{name}"] = found["agreement"].mean
    return metrics


def check_best_metric(args: MOPOConfig, groups: EvalGroups | None, objectives: Sequence[str]) -> None:
    """Raises ValueError where metric_for_best_model names no metric of this run, before the first step."""
    if args.metric_for_best_model is None or groups is None:
        return
    metrics: list[str] = []
    for prefix, one in by_prefix(groups, "eval").items():
        names = [name for name, kept in zip(objectives, _labelled(one).tolist(), strict=True) if kept]
        metrics += [f"{prefix}_loss", *(f"{prefix}_{kind}/{name}" for name in names for kind in KINDS)]
    wanted = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if wanted not in metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is no metric of this run; {it_has(wanted, metrics)}"
        )


def _labelled(groups: TokenizedGroups) -> Tensor:  # [K]
    """Which objectives have a label."""
    return ~torch.isnan(groups.win_rate).all(0)
