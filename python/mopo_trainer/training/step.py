"""One training step: which responses count, what enters the model, and what is remembered of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels import MOPODual, MOPOOutput, mopo_objective
from mopo_kernels.objective.steps import PolicyStep
from mopo_kernels.objective.target import LabelStatistics, label_statistics
from mopo_trainer.data.packing import GroupBatch, PackedSequences
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.head import Scoring

SUMS = ("tokens", "skipped_tokens", "router_loss", "router_groups")  # over micro-batches and ranks


class StepLabels(NamedTuple):
    """The labels of a batch, on the CPU in float64."""

    win_rate: Tensor  # [B, K]
    group: Tensor  # [B]
    lag_log_ratio: Tensor | None  # [B]

    @classmethod
    def of(cls, parts: Sequence[StepLabels], dual: MOPODual) -> StepLabels:
        """Several batches as one, whose groups stay apart; none as one of no responses."""
        if not parts:
            return cls(
                dual.multipliers.new_empty(0, len(dual.objectives)).cpu(), torch.empty(0, dtype=torch.int64), None
            )
        offset = max(int(part.group.max()) for part in parts) + 1
        lags = [part.lag_log_ratio for part in parts if part.lag_log_ratio is not None]
        group = torch.cat([part.group + i * offset for i, part in enumerate(parts)])
        return cls(torch.cat([part.win_rate for part in parts]), group, torch.cat(lags) if lags else None)

    def statistics(self, dual: MOPODual) -> LabelStatistics:
        """What labels and multipliers say, once: loss, dual and log read it."""
        return label_statistics(
            self.win_rate,
            self.group,
            dual.multipliers.cpu(),
            tau=dual.tau,
            eps=float(dual.eps),
            lag_log_ratio=self.lag_log_ratio,
            primary=dual.objectives.index(dual.primary),
        )


@dataclass(frozen=True)
class StepBatch:
    """What a step hands to model and loss, all on the CPU."""

    labels: StepLabels
    statistics: LabelStatistics
    index: Tensor | None  # [S] the responses that enter the model, or None for all
    packed: PackedSequences
    all_tokens: int
    router_loss: Tensor | None = None  # [] of a mixture of experts, unweighted

    @classmethod
    def of(cls, batch: GroupBatch, labels: StepLabels, dual: MOPODual, args: MOPOConfig, scoring: Scoring) -> StepBatch:
        statistics, index = labels.statistics(dual), None
        sequences, group = batch.sequences, batch.group
        if args.policy_step == "clone":
            index = (statistics.weights > args.min_weight).nonzero().squeeze(-1)
            sequences, group = sequences.take(index), group[index]
        packed = scoring.pack(sequences, group)
        return cls(labels, statistics, index, packed, batch.sequences.ids.numel())

    def objective(
        self, logp: Tensor, dual: MOPODual, *, ref_logp: Tensor | None, policy_step: PolicyStep
    ) -> MOPOOutput:
        """The loss from log-probabilities [S] of the responses that entered the model."""
        labels, kept = self.labels, None
        if self.index is not None:
            index = self.index.to(logp.device)
            kept = torch.zeros(len(labels.group), dtype=torch.bool, device=logp.device).index_fill(0, index, True)
            logp = logp.new_zeros(kept.shape).index_copy(0, index, logp)
        return mopo_objective(
            logp,
            labels.win_rate.to(logp.device),
            labels.group.to(logp.device),
            dual.multipliers.to(logp.device),
            tau=dual.tau,
            eps=float(dual.eps),
            ref_logp=ref_logp,
            lag_log_ratio=None if labels.lag_log_ratio is None else labels.lag_log_ratio.to(logp.device),
            policy_step=policy_step,
            primary=dual.objectives.index(dual.primary),
            kept=kept,
        )


class StepRecord:
    """What the micro-batches of the running step hold for the dual, and of the steps since the last log for the log.

    Estimates are those of the labels of the whole step, of all its micro-batches on all ranks, as the dual has them.
    """

    def __init__(self, least_weight: float | None = None) -> None:
        self.least_weight = least_weight  # of a response that enters the model; None: all do
        self._batches: list[StepBatch] = []
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._since = time.perf_counter()

    def start_clock(self) -> None:
        """Tokens per second count from the first step after a log: evaluation and reference passes are not training."""
        if not self._values:
            self._since = time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        self._batches.append(batch)
        self._sums["tokens"] += batch.packed.tokens
        self._sums["skipped_tokens"] += batch.all_tokens - batch.packed.tokens
        if batch.router_loss is not None:
            groups = int(batch.labels.group[-1]) + 1
            self._sums["router_groups"] += groups
            self._sums["router_loss"] += groups * batch.router_loss.item()

    def move(self, dual: MOPODual) -> None:
        """Move the multipliers by the labels of the whole step, groups of its micro-batches kept apart; forget them."""
        batches, self._batches = self._batches, []
        statistics = batches[0].statistics if len(batches) == 1 else None
        found = dual.update(*StepLabels.of([batch.labels for batch in batches], dual), statistics=statistics)
        for name in ("win_rates", "lower_bounds", "ess", "kl"):
            self._values[name].append(getattr(found.values, name))
        self._values["dropped_mass"].append(self._dropped_mass(found))

    def _dropped_mass(self, statistics: LabelStatistics) -> Tensor:  # []
        """Weight of the responses that do not enter the model, mean over groups."""
        weights = statistics.weights
        if self.least_weight is None:
            return weights.new_zeros(())
        return statistics.groups.mean_of_sums(weights.masked_fill(weights > self.least_weight, 0))

    def metrics(self, dual: MOPODual, accelerator: Any) -> dict[str, float]:
        """Means since the last log over steps, sums over ranks; then starts over."""
        if not self._values:
            return {}
        mean = {name: torch.stack(values).nanmean(0) for name, values in self._values.items()}
        sums = torch.tensor(list(self._sums.values()), device=accelerator.device)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        total = dict(zip(SUMS, sums.tolist(), strict=True))
        seconds = time.perf_counter() - self._since
        logs: dict[str, float] = {name: mean[name].item() for name in ("ess", "kl", "dropped_mass")}
        if total["router_groups"]:
            logs["router_loss"] = total["router_loss"] / total["router_groups"]
        logs |= {"tokens_per_second": total["tokens"] / seconds, "skipped_tokens": total["skipped_tokens"]}
        thresholds = dict(zip(dual.secondaries, dual.thresholds.tolist(), strict=True))
        for k, name in enumerate(dual.objectives):
            logs[f"win_rate/{name}"] = mean["win_rates"][k].item()
            logs[f"multiplier/{name}"] = dual.multipliers[k].item()
            logs[f"bound/{name}"] = mean["lower_bounds"][k].item()
            if thresholds.get(name, -torch.inf) > -torch.inf:
                logs[f"threshold/{name}"] = thresholds[name]
                logs[f"slack/{name}"] = logs[f"bound/{name}"] - thresholds[name]
        self._values.clear()
        self._sums = dict.fromkeys(SUMS, 0.0)
        return logs
