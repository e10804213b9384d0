"""One training step: which responses count, what enters the model, and what is remembered of it."""

from __future__ import annotations

import time
from collections import defaultdict
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


class StepLabels(NamedTuple):
    """The labels of a batch, on the CPU in float64."""

    win_rate: Tensor  # [B, K]
    group: Tensor  # [B]
    lag_log_ratio: Tensor | None  # [B]

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

    @property
    def dropped_mass(self) -> Tensor:  # []
        """Weight of the responses that do not enter the model, mean over groups."""
        dropped = self.statistics.weights.clone()
        if self.index is None:
            return dropped.new_zeros(())
        dropped[self.index] = 0
        return self.statistics.groups.mean_of_sums(dropped)


class StepRecord:
    """What the micro-batches of the running step hold for the dual, and of the steps since the last log for the log."""

    def __init__(self) -> None:
        self._batches: list[StepBatch] = []
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens = {"tokens": 0, "skipped_tokens": 0}
        self._since = time.perf_counter()

    def start_clock(self) -> None:
        """Tokens per second count from the first step after a log: evaluation and reference passes are not training."""
        if not self._values:
            self._since = time.perf_counter()

    def add(self, batch: StepBatch) -> None:
        self._batches.append(batch)
        values = batch.statistics.values
        for name in ("win_rates", "lower_bounds", "ess", "kl"):
            self._values[name].append(getattr(values, name))
        self._values["dropped_mass"].append(batch.dropped_mass)
        if batch.router_loss is not None:
            self._values["router_loss"].append(batch.router_loss)
        self._tokens["tokens"] += batch.packed.tokens
        self._tokens["skipped_tokens"] += batch.all_tokens - batch.packed.tokens

    def move(self, dual: MOPODual) -> None:
        """Move the multipliers by the labels of the whole step, groups of its micro-batches kept apart; forget them."""
        batches, self._batches = self._batches, []
        if len(batches) == 1:
            dual.update(*batches[0].labels, statistics=batches[0].statistics)
            return
        parts = [batch.labels for batch in batches]
        offset = max(int(part.group.max()) for part in parts) + 1
        lags = [part.lag_log_ratio for part in parts if part.lag_log_ratio is not None]
        dual.update(
            torch.cat([part.win_rate for part in parts]),
            torch.cat([part.group + i * offset for i, part in enumerate(parts)]),
            torch.cat(lags) if lags else None,
        )

    def metrics(self, dual: MOPODual, accelerator: Any) -> dict[str, float]:
        """Means since the last log over steps and ranks, token counts summed; then starts over."""
        if not self._values:
            return {}
        mean = {name: torch.stack(values).nanmean(0) for name, values in self._values.items()}
        counts = torch.tensor([float(self._tokens["tokens"]), float(self._tokens["skipped_tokens"])])
        if accelerator.num_processes > 1:
            device = accelerator.device
            mean = {k: accelerator.gather(v[None].to(device)).nanmean(0).cpu() for k, v in mean.items()}
            counts = accelerator.reduce(counts.to(device), reduction="sum").cpu()
        seconds = time.perf_counter() - self._since
        single = [name for name in ("ess", "kl", "dropped_mass", "router_loss") if name in mean]
        logs: dict[str, float] = {name: mean[name].item() for name in single}
        logs |= {"tokens_per_second": counts[0].item() / seconds, "skipped_tokens": counts[1].item()}
        thresholds = dict(zip(dual.secondaries, dual.thresholds.tolist(), strict=True))
        for k, name in enumerate(dual.objectives):
            logs[f"win_rate/{name}"] = mean["win_rates"][k].item()
            logs[f"multiplier/{name}"] = dual.multipliers[k].item()
            logs[f"bound/{name}"] = mean["lower_bounds"][k].item()
            if thresholds.get(name, -torch.inf) > -torch.inf:
                logs[f"threshold/{name}"] = thresholds[name]
                logs[f"slack/{name}"] = logs[f"bound/{name}"] - thresholds[name]
        self._values.clear()
        self._tokens = {"tokens": 0, "skipped_tokens": 0}
        return logs
