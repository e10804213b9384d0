"""A training run on a table as the trainer makes it: batches, moving multipliers, a reference that lags, a ratchet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.studies.tabular.methods import Groups, make_dual
from bench.studies.tabular.problems import TAU, Problem
from mopo_kernels import InfeasibleThresholds, label_statistics
from mopo_kernels.objective.multipliers import UpdateRule
from mopo_kernels.objective.steps import STEPS, PolicyStep, step_target

LAG_CLIP = 10.0  # the trainer's default


@dataclass(frozen=True)
class Schedule:
    steps: int = 500
    batch: int = 8  # groups, the paper's
    rate: float = 0.02  # of Adam
    rule: UpdateRule = "exact"
    step: PolicyStep = "clone"
    beta: float = 0.9995
    lag: int | None = None  # t0


@dataclass(frozen=True)
class Run:
    policy: list[float]  # [Y]
    multipliers: list[float]  # [K]
    thresholds: list[float]  # [K-1] in force at the end
    stopped: int | None  # the step at which the thresholds were refused


def train(problem: Problem, data: Groups, thresholds: Tensor, schedule: Schedule, seed: int) -> Run:
    generator = torch.Generator().manual_seed(seed)
    dual = make_dual(thresholds, update=schedule.rule, ratchet_beta=schedule.beta, lag_steps=schedule.lag)
    logits = problem.pi_ref.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=schedule.rate)
    start = now = lag = problem.pi_ref.log()
    stopped = None

    def omega(rows: Tensor) -> Tensor | None:
        return None if lag is start else (lag - start)[rows].clamp(-LAG_CLIP, LAG_CLIP)

    try:
        dual.refresh(data.win_rate, data.group)
        for step in range(schedule.steps):
            stopped = step
            part = data.batch(torch.randperm(int(data.group[-1]) + 1, generator=generator)[: schedule.batch])
            ratio = omega(part.response)
            labels = label_statistics(
                part.win_rate, part.group, dual.multipliers.clone(), tau=TAU, lag_log_ratio=ratio
            )  # fmt: skip
            reference = (start if schedule.step == "contrast" else lag)[part.response]
            loss = STEPS[schedule.step].loss(
                logits.log_softmax(0)[part.response], step_target(schedule.step, labels, reference)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            dual.update(part.win_rate, part.group, ratio, statistics=labels)
            if dual.lag_due:
                lag, now = now, logits.detach().log_softmax(0)
                dual.refresh(data.win_rate, data.group, omega(data.response), ratchet=True)
        stopped = None
    except InfeasibleThresholds:
        pass
    return Run(
        logits.detach().softmax(0).tolist(), dual.multipliers.tolist(), dual.thresholds.tolist(), stopped
    )  # fmt: skip
