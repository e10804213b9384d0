"""`MOPODual`: the multipliers of a training run, their three update rules, the lag and the ratchet.

Source: Agnihotri et al., Multi-Objective Preference Optimization, arXiv 2505.10892, Algorithm 1 and its barrier
variant.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mopo_kernels.backends.batch import Labels
from mopo_kernels.checks import check_choice, check_eps, check_positive, check_tau
from mopo_kernels.objective.dataset import group_labels, policy_bounds, policy_moments
from mopo_kernels.objective.dual import (
    MAX_MULTIPLIER,
    InfeasibleThresholds,
    attainable_range,
    auto_eps_grouped,
    check_beta,
    full_thresholds,
    solve_grouped,
)
from mopo_kernels.objective.robust import bound_at, tilt
from mopo_kernels.objective.target import LabelStatistics, TargetPolicy, label_statistics

UpdateRule = Literal["exact", "sgd", "barrier"]


def barrier_multipliers(
    slack: Tensor,  # [K-1] u = LB - b
    sigma: float,
    delta: float,
) -> Tensor:  # [K-1]
    """Multipliers of the log barrier: sigma / u for u >= delta, and sigma (2 - u / delta) / delta below.

    The second form is the derivative of the quadratic extension of -log: finite, and decreasing in u, where a threshold
    is violated. Raises ValueError unless sigma and delta are positive. Source: paper, MOPO-LB.
    """
    check_positive(sigma=sigma, delta=delta)
    return torch.where(slack >= delta, sigma / slack.clamp(min=delta), sigma * (2 - slack / delta) / delta)


class MOPODual(nn.Module):
    """The multipliers of a training run and all that moves them, as float64 buffers that save and load with the model.

    Call `refresh` with the whole data set's labels before training and at every lag, and `update` with the batch's
    labels once a step; pass `multipliers` and `eps` to `mopo_loss`. Update rules:

        exact    `refresh` solves the dual over the data set; `update` only records the batch's estimates
        sgd      chi_k <- max(chi_min, chi_k - chi_lr (eps - KL(q_chi || r))), then
                 lambda_k <- max(0, lambda_k - multiplier_lr (LB_k - b_k))                        paper, Algorithm 1
        barrier  lambda_k <- lambda_k + multiplier_lr (barrier(LB_k - b_k) - lambda_k), where multiplier_lr = 1 is the
                 paper's MOPO-LB and a smaller one damps the noise of a batch (ours)

    An objective that the batch does not label keeps its multiplier and its estimates. Under torch.distributed `update`
    gathers the labels of all ranks, so that every rank takes the same step.

    Attributes: objectives, primary, secondaries (names), tau, rule, lag_steps.
    Buffers: multipliers[K], chi[K], win_rates[K], lower_bounds[K], thresholds[K-1] (in force), floors[K-1] (the
    user's), eps[] (NaN for "auto" until the first refresh), step[] int64.
    """

    multipliers: Tensor
    chi: Tensor
    win_rates: Tensor
    lower_bounds: Tensor
    thresholds: Tensor
    floors: Tensor
    eps: Tensor
    step: Tensor

    def __init__(
        self,
        objectives: Sequence[str],
        *,
        primary: str,
        thresholds: Mapping[str, float],  # of secondaries; one that is missing is unconstrained
        tau: float = 0.08,
        eps: float | Literal["auto"] = 0.0,  # KL radius of the robust bounds; the paper's 0.15 rarely is feasible
        update: UpdateRule = "exact",
        lag_steps: int | None = None,  # t0: steps between two refreshes; None = never
        ratchet_beta: float = 0.9995,  # beta
        chi_lr: float = 0.1,  # eta_chi
        chi_min: float = 1e-3,
        multiplier_lr: float = 0.02,  # eta_lambda; barrier: weight of the newest estimate
        sigma: float = 0.01,  # strength of the barrier: a binding threshold keeps a slack of about sigma / lambda
        delta: float = 0.02,  # slack below which the barrier is linear; a lambda above 2 sigma / delta has none left
        max_multiplier: float = MAX_MULTIPLIER,
    ) -> None:
        super().__init__()
        _check_names(objectives, primary, thresholds)
        check_choice("update", update, get_args(UpdateRule))
        check_tau(tau)
        if eps != "auto":
            check_eps(eps)
        check_beta(ratchet_beta)
        check_positive(
            chi_lr=chi_lr, chi_min=chi_min, multiplier_lr=multiplier_lr, sigma=sigma, delta=delta,
            max_multiplier=max_multiplier, lag_steps=1 if lag_steps is None else lag_steps,
        )  # fmt: skip
        self.objectives = list(objectives)
        self.primary = primary
        self.secondaries = [name for name in objectives if name != primary]
        self.tau = tau
        self.rule = update
        self.lag_steps = lag_steps
        self.ratchet_beta = ratchet_beta
        self.chi_lr, self.chi_min = chi_lr, chi_min
        self.multiplier_lr = multiplier_lr
        self.sigma, self.delta = sigma, delta
        self.max_multiplier = max_multiplier
        self._auto_eps = eps == "auto"

        count = len(self.objectives)
        floors = torch.tensor([thresholds.get(name, -math.inf) for name in self.secondaries], dtype=torch.float64)
        multipliers = torch.zeros(count, dtype=torch.float64)
        multipliers[self._primary_index] = 1
        self.register_buffer("multipliers", multipliers)
        self.register_buffer("chi", torch.full_like(multipliers, math.inf if eps == 0 else 1))
        self.register_buffer("win_rates", torch.full_like(multipliers, math.nan))
        self.register_buffer("lower_bounds", torch.full_like(multipliers, math.nan))
        self.register_buffer("thresholds", floors.clone())
        self.register_buffer("floors", floors)
        self.register_buffer("eps", torch.tensor(math.nan if eps == "auto" else eps, dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def slack(self) -> Tensor:  # [K-1]
        """LB_k - b_k of the last estimates; negative where a threshold is violated."""
        return self.lower_bounds[self._secondary_index] - self.thresholds

    @property
    def lag_due(self) -> bool:
        """Whether `lag_steps` more steps have been taken, and `refresh` is due with the new lag ratios."""
        return self.lag_steps is not None and int(self.step) > 0 and int(self.step) % self.lag_steps == 0

    @torch.no_grad()
    def refresh(
        self,
        win_rate: Tensor,  # [M, K] the whole data set
        group: Tensor,  # [M]
        lag_log_ratio: Tensor | None = None,  # [M] log pi_lag - log pi_ref0
        *,
        ratchet: bool = False,
    ) -> None:
        """Looks at the whole data set: resolves eps="auto", checks the thresholds, solves the dual under "exact".

        `ratchet=True` first sets every threshold to b = max(floor, beta G), G being what the policy of one lag ago, the
        new reference, attains on the data (rho = 1). Estimates and chi are those of the data set, under every rule.

        Raises InfeasibleThresholds, with the objective's name, where no policy can meet the thresholds. Warns where the
        barrier is too weak to.
        """
        self._check_columns(win_rate)
        labels = group_labels(*self._moved(win_rate, group, lag_log_ratio))
        primary = self._primary_index
        if self._auto_eps:
            self.eps.fill_(auto_eps_grouped(labels, beta=self.ratchet_beta, primary=primary))
        if ratchet:
            at_reference = policy_moments(labels, torch.zeros_like(self.multipliers), self.tau).win_rates
            attained = at_reference[self._secondary_index]
            self.thresholds.copy_(torch.maximum(self.floors, self.ratchet_beta * attained))
        try:
            solution = solve_grouped(
                labels,
                full_thresholds(self.thresholds, len(self.objectives), primary),
                tau=self.tau,
                eps=float(self.eps),
                primary=primary,
                max_multiplier=self.max_multiplier,
            )
        except InfeasibleThresholds as error:
            raise InfeasibleThresholds(
                self.objectives[int(error.objective)], error.threshold, error.attainable
            ) from None
        if self.rule == "exact":
            self.multipliers.copy_(solution.multipliers)
        if self.rule == "barrier":
            self._warn_of_a_weak_barrier(solution.multipliers)
        win_rates = policy_moments(labels, self.multipliers, self.tau).win_rates
        self._record(win_rates, *policy_bounds(labels, self.multipliers, self.tau, float(self.eps)))

    @torch.no_grad()
    def update(
        self,
        win_rate: Tensor,  # [B, K] the batch of this rank
        group: Tensor,  # [B]
        lag_log_ratio: Tensor | None = None,  # [B]
        *,
        statistics: LabelStatistics | None = None,
    ) -> LabelStatistics:
        """One step of the update rule on a batch's labels; returns what they said before the multipliers moved.

        `statistics` are the `label_statistics` of just these labels under the multipliers and eps in force, where they
        are there already. Under torch.distributed the labels of all ranks count, of which some may have none, and every
        rank ends with the buffers of the first, bit for bit.

        Raises InfeasibleThresholds where a multiplier outgrows `max_multiplier`, and RuntimeError where eps="auto" has
        not been resolved by a `refresh`.
        """
        if self.eps.isnan():
            raise RuntimeError('eps="auto" is resolved on the whole data set: call refresh before update')
        self._check_columns(win_rate)
        win_rate, group, lag_log_ratio = self._moved(*_gather_ranks(win_rate, group, lag_log_ratio))
        primary, eps = self._primary_index, float(self.eps)
        labels = Labels(win_rate, group, self.multipliers, lag_log_ratio, self.tau, eps, primary)
        if statistics is None or statistics.slot.shape != group.shape:
            statistics = label_statistics(**labels._asdict())
        values = statistics.to(self.multipliers.device).values
        lower_bounds, chi = values.lower_bounds, values.chi
        if self.rule == "sgd" and eps > 0:
            lower_bounds, chi = self._descend_chi(labels)
        self._record(values.win_rates, lower_bounds, chi)
        self._move_multipliers(lower_bounds)
        self._check_multipliers(win_rate, group, lag_log_ratio)
        self.step += 1
        self._take_from_first()
        return statistics

    def _take_from_first(self) -> None:
        """Buffers as the first rank has them: another processor's arithmetic may differ in the last bit, and drift."""
        if not _is_distributed():
            return
        first: list[Any] = [{name: buffer.cpu() for name, buffer in self.named_buffers()}]
        dist.broadcast_object_list(first, src=0)
        self.load_state_dict(first[0])

    def _descend_chi(self, labels: Labels) -> tuple[Tensor, Tensor]:  # [K], [K]
        """One gradient step on chi, and the bounds there."""
        values, ref_weights = TargetPolicy.of(labels).ratio_sample()
        _, kl = tilt(values, ref_weights, 1 / self.chi.clamp(min=self.chi_min))
        chi = (self.chi - self.chi_lr * (labels.eps - kl)).clamp(min=self.chi_min)
        return bound_at(values, ref_weights, chi, labels.eps), chi

    def _record(self, win_rates: Tensor, lower_bounds: Tensor, chi: Tensor) -> None:
        """Keeps the newest estimates; NaN is an objective that the batch does not label."""
        for buffer, new in ((self.win_rates, win_rates), (self.lower_bounds, lower_bounds), (self.chi, chi)):
            buffer.copy_(torch.where(new.isnan(), buffer, new))

    def _move_multipliers(self, lower_bounds: Tensor) -> None:
        if self.rule == "exact":
            return
        slack = lower_bounds[self._secondary_index] - self.thresholds
        old = self.multipliers[self._secondary_index]
        if self.rule == "sgd":
            new = (old - self.multiplier_lr * slack).clamp(min=0)
        else:
            new = old + self.multiplier_lr * (barrier_multipliers(slack, self.sigma, self.delta) - old)
        self.multipliers[self._secondary_index] = torch.where(slack.isnan(), old, new)

    def _check_multipliers(self, win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None) -> None:
        """Raises InfeasibleThresholds where a multiplier has outgrown `max_multiplier`."""
        largest = int(self.multipliers.argmax())
        if self.multipliers[largest] <= self.max_multiplier or largest == self._primary_index:
            return
        _, best = attainable_range(
            win_rate, group, tau=self.tau, eps=float(self.eps), primary=self._primary_index, lag_log_ratio=lag_log_ratio
        )
        name = self.objectives[largest]
        raise InfeasibleThresholds(name, float(self.thresholds[self.secondaries.index(name)]), float(best[largest]))

    def _warn_of_a_weak_barrier(self, needed: Tensor) -> None:
        """The barrier gives 2 sigma / delta at a slack of 0: a threshold whose price is higher ends up violated."""
        strongest = 2 * self.sigma / self.delta
        for index in self._secondary_index:
            if needed[index] > strongest:
                warnings.warn(
                    f"the threshold of {self.objectives[index]!r} needs a multiplier of {float(needed[index]):.3g} and "
                    f"will be missed: there the barrier gives 2 sigma / delta = {strongest:.3g}; raise sigma or lower "
                    "delta",
                    RuntimeWarning,
                    stacklevel=3,
                )

    @property
    def _primary_index(self) -> int:
        return self.objectives.index(self.primary)

    @property
    def _secondary_index(self) -> list[int]:
        return [index for index, name in enumerate(self.objectives) if name != self.primary]

    def _moved(
        self, win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The labels on the buffers' device."""
        device = self.multipliers.device
        return win_rate.to(device), group.to(device), None if lag_log_ratio is None else lag_log_ratio.to(device)

    def _check_columns(self, win_rate: Tensor) -> None:
        if win_rate.dim() != 2 or win_rate.shape[1] != len(self.objectives):
            raise ValueError(
                f"win_rate must have one column for each of the objectives {', '.join(self.objectives)}; "
                f"got {tuple(win_rate.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MOPODual":
        """Follows the model to its device but never to its dtype: multipliers in float16 would not resume exactly."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def _gather_ranks(
    win_rate: Tensor, group: Tensor, lag_log_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batches of all ranks as one; groups of different ranks stay different whatever their ids."""
    if not _is_distributed():
        return win_rate, group, lag_log_ratio
    lag = None if lag_log_ratio is None else lag_log_ratio.cpu()
    batches: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(batches, (win_rate.cpu(), group.unique(return_inverse=True)[1].cpu(), lag))
    win_rates, groups, lags = zip(*batches, strict=True)
    offset = max(rows.shape[0] for rows in win_rates)
    distinct = torch.cat([ids + rank * offset for rank, ids in enumerate(groups)])
    given = [ratio for ratio in lags if ratio is not None]
    return torch.cat(win_rates), distinct, torch.cat(given) if given else None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _check_names(objectives: Sequence[str], primary: str, thresholds: Mapping[str, float]) -> None:
    repeated = {name for name in objectives if list(objectives).count(name) > 1}
    if repeated:
        raise ValueError(f"objectives must have different names; {', '.join(sorted(repeated))} stands there twice")
    if primary not in objectives:
        raise ValueError(f"primary must be one of the objectives {', '.join(objectives)}; got {primary!r}")
    for name, threshold in thresholds.items():
        if name == primary:
            raise ValueError(f"thresholds: {name!r} is the primary objective, which is maximised; drop its threshold")
        if name not in objectives:
            raise ValueError(f"thresholds: {name!r} is not one of the objectives {', '.join(objectives)}")
        if not threshold < math.inf:
            raise ValueError(f"thresholds: {name!r} must have a number below inf; got {threshold}")
