"""The methods: MOPO's steps through the library, and what they are compared with in a few lines each."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bench.studies.lab.data import Labelled, fresh_win_rate
from bench.studies.lab.language import OBJECTIVES, scores
from bench.studies.lab.measure import opponents, wins
from bench.studies.lab.model import SMALL, Origin, TinyLM, sample
from mopo_kernels import MOPODual, label_statistics, mopo_objective, policy_loss, sequence_logprob

PRIMARY = OBJECTIVES[0]
BREVITY = 0.6  # what the policy shall hold
RELEVANCE = 0.5  # its threshold in every run
RELEVANCE_PRICE = 0.14  # weight of relevance where weights are set by hand: near its multiplier on the population
LAG_CLIP = 10.0  # as in MOPOConfig
SEQUENCES = 64  # per optimizer step
WARM_UP = 0.1


@dataclass(frozen=True)
class Method:
    """A contestant. `aim` is its one dial: the brevity threshold asked of the dual, or brevity's weight."""

    step: str  # clone, contrast, regress: the library's; dpo, ipo, modpo: below; soup: adapters averaged
    lr: float
    aim: float | None = None  # None: brevity asks nothing
    scale: str = "exact"  # the dual that sets the multipliers: exact, sgd, barrier; by hand: weights
    tau: float = 0.08
    beta: float = 0.1  # of DPO and its kin
    mix: float = 0.0  # clone's likelihood per token, added
    average: bool = False  # log-probabilities per token
    min_weight: float = 1e-5
    importance: bool = False  # weights relative to the base, not to who wrote the notes
    measured: bool = False  # the threshold asked is moved by the policy's own notes on the tuning prompts, three times
    shrink: bool = False  # labels as what they are against fresh notes: ((n - 1) v + 1) / (n + 1)


class Trained(NamedTuple):
    model: TinyLM
    multipliers: list[float]
    tokens: int  # of notes that went through the policy, forward and backward
    steps: int
    seconds: float


def train(base: TinyLM, data: Labelled, method: Method, budget: int, seed: int) -> Trained:
    """The base after `budget` tokens of training."""
    start = time.process_time()
    if method.step == "soup":
        return _soup(base, data, method, budget, seed)
    torch.manual_seed(seed)
    size = int((data.group == 0).sum())
    if method.shrink:
        data = data._replace(win_rate=fresh_win_rate(data.win_rate, size))
    model, dual = deepcopy(base).train(), dual_of(method, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.lr, weight_decay=0.0)
    used, steps, order = 0, 0, torch.tensor([], dtype=torch.int64)
    while used < budget:
        if len(order) * size < SEQUENCES:
            order = torch.randperm(len(data.group) // size)
        some, order = order[: SEQUENCES // size], order[SEQUENCES // size :]
        batch = data.take((some[:, None] * size + torch.arange(size)).flatten())
        loss, tokens = loss_of(model, batch, method, dual)
        done = used / budget
        optimizer.param_groups[0]["lr"] = method.lr * min((done + 0.02) / WARM_UP, (1 - done) / (1 - WARM_UP))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if method.measured and int(4 * (used + tokens) / budget) > int(4 * done) and used + tokens < budget:
            dual.thresholds[0] += BREVITY - brevity_of(model, seed + steps)
            dual.refresh(data.win_rate, data.group)
        used, steps = used + tokens, steps + 1
    return Trained(model.eval(), dual.multipliers.tolist(), used, steps, time.process_time() - start)


def dual_of(method: Method, data: Labelled) -> MOPODual:
    """Multipliers from the labels, or by hand."""
    by_hand = method.scale == "weights"
    thresholds = {"relevance": RELEVANCE} | ({} if method.aim is None else {"brevity": method.aim})
    dual = MOPODual(
        OBJECTIVES,
        primary=PRIMARY,
        thresholds={} if by_hand else thresholds,
        tau=method.tau,
        update="exact" if by_hand else method.scale,  # type: ignore[arg-type]
    )
    dual.refresh(data.win_rate, data.group, _lag(method, data))
    if by_hand:
        dual.multipliers[1:] = torch.tensor([method.aim or 0.0, 0.0 if method.aim is None else RELEVANCE_PRICE])
    return dual


@torch.no_grad()
def brevity_of(model: TinyLM, seed: int, prompts: int = 60, origin: Origin = SMALL) -> float:
    """Win rate in brevity against the base, on tuning prompts."""
    asked, theirs = opponents("base", "tune", prompts, origin)
    return float(wins(scores(asked, sample(model, asked, 4, seed)), theirs)[:, 1].mean())


def _lag(method: Method, data: Labelled) -> Tensor | None:
    return data.log_ratio.clamp(-LAG_CLIP, LAG_CLIP) if method.importance else None


def loss_of(model: TinyLM, batch: Labelled, method: Method, dual: MOPODual) -> tuple[Tensor, int]:
    """The loss of a batch and the tokens that entered the model."""
    labels, tokens = (batch.win_rate, batch.group), (batch.target >= 0).sum(1)
    lag = _lag(method, batch)
    statistics = label_statistics(*labels, dual.multipliers, tau=method.tau, lag_log_ratio=lag)
    if method.scale in ("sgd", "barrier"):
        dual.update(*labels, lag, statistics=statistics)
    if method.step == "clone":
        index = (statistics.weights > method.min_weight).nonzero()[:, 0]
        hidden, target = model(batch.ids[index]), batch.target[index]
        options = {"index": index, "min_weight": method.min_weight, "average": method.average}
        return policy_loss(hidden, model.head, target, statistics, **options).loss, int(tokens[index].sum())
    hidden, used = model(batch.ids), int(tokens.sum())
    if method.step in PAIR_LOSSES:
        logp = sequence_logprob(hidden, model.head, batch.target)
        i, j = pairs(batch.group)
        h = logp - batch.ref_logp
        log_ratio = h[i] - h[j]
        return PAIR_LOSSES[method.step](log_ratio, batch, method, dual.multipliers), used
    length = tokens if method.average else 1
    if method.mix == 0:
        step = {"policy_step": method.step, "ref_logp": batch.ref_logp / length, "average": method.average}
        return policy_loss(hidden, model.head, batch.target, statistics, **step).loss, used
    logp = sequence_logprob(hidden, model.head, batch.target)
    options = {"tau": method.tau, "lag_log_ratio": lag}
    order = mopo_objective(
        logp / length, *labels, dual.multipliers, ref_logp=batch.ref_logp / length, policy_step=method.step, **options
    )
    likelihood = mopo_objective(logp / tokens, *labels, dual.multipliers, policy_step="clone", **options)
    return order.loss + method.mix * likelihood.loss, used


# ---------------------------------------------------------------------------------------------------------- baselines


def pairs(group: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of notes to one prompt."""
    i, j = torch.triu_indices(len(group), len(group), offset=1)
    same = group[i] == group[j]
    return i[same], j[same]


def difference(batch: Labelled) -> Tensor:  # [pairs, K]
    """Win rate in the group of the first note less the second's; of pairs 2 P_k - 1."""
    i, j = pairs(batch.group)
    return batch.win_rate[i] - batch.win_rate[j]


def order(batch: Labelled) -> Tensor:  # [pairs, K]
    """2 P_k - 1 of the first note against the second, as exact labels have it: the one that beats more of the group."""
    return difference(batch).sign()


def margin(batch: Labelled, multipliers: Tensor) -> Tensor:  # [pairs]
    """m = sum_k lambda_k (2 P_k - 1) of the first note against the second."""
    return order(batch) @ multipliers


def dpo(log_ratio: Tensor, batch: Labelled, method: Method, multipliers: Tensor) -> Tensor:
    """DPO on soft labels: a weighted mean of the labels, or under the dual's multipliers those of MOPO's target.

    log (pi*_i / pi*_j) - log (ref_i / ref_j) = sum_k lambda_k (v_ik - v_jk) / tau, whose sigmoid is the label (as MoCAN
    fits a policy to rewards weighted by a dual that was solved before, arXiv 2405.19544).
    """
    if method.scale == "weights":
        label = (1 + margin(batch, multipliers) / multipliers.sum()) / 2
    else:
        label = (difference(batch) @ multipliers / method.tau).sigmoid()
    z = method.beta * log_ratio
    return -(label * logsigmoid(z) + (1 - label) * logsigmoid(-z)).mean()


def ipo(log_ratio: Tensor, batch: Labelled, method: Method, multipliers: Tensor) -> Tensor:
    """(h_1 - h_2 - m / (2 beta))^2, m the weighted mean of the labels in [-1, 1] (arXiv 2310.12036)."""
    return ((log_ratio - margin(batch, multipliers) / multipliers.sum() / (2 * method.beta)) ** 2).mean()


def modpo(log_ratio: Tensor, batch: Labelled, method: Method, multipliers: Tensor) -> Tensor:
    """DPO on the primary's labels, the secondaries' ±1 in the place of reward margins (arXiv 2310.03708, Eq. 10)."""
    share = multipliers / multipliers.sum()
    secondaries = margin(batch, torch.cat([share.new_zeros(1), share[1:]]))
    label = (1 + order(batch)[:, 0]) / 2
    z = (method.beta * log_ratio - secondaries) / share[0]
    return -(label * logsigmoid(z) + (1 - label) * logsigmoid(-z)).mean()


PAIR_LOSSES: dict[str, Callable[[Tensor, Labelled, Method, Tensor], Tensor]] = {"dpo": dpo, "ipo": ipo, "modpo": modpo}

_ALONE: dict[tuple, Trained] = {}


def _soup(base: TinyLM, data: Labelled, method: Method, budget: int, seed: int) -> Trained:
    """Rewarded soups (arXiv 2306.04488): a model per objective by contrast, their parameters averaged by weights."""
    alone = replace(method, step="contrast", aim=None, scale="weights")
    shares = torch.tensor([1.0, method.aim or 0.0, RELEVANCE_PRICE])
    shares /= shares.sum()
    parts = []
    for k in range(len(OBJECTIVES)):
        key = (alone, seed, k, budget)
        if key not in _ALONE:
            columns = torch.tensor([k, *(j for j in range(len(OBJECTIVES)) if j != k)])
            _ALONE[key] = train(base, data._replace(win_rate=data.win_rate[:, columns]), alone, budget, seed)
        parts.append(_ALONE[key])
    mixed = deepcopy(base)
    states = [part.model.state_dict() for part in parts]
    mixed.load_state_dict({n: sum(s * x[n] for s, x in zip(shares, states, strict=True)) for n in states[0]})
    totals = [sum(part[i] for part in parts) for i in (2, 3, 4)]
    return Trained(mixed.eval(), shares.tolist(), *totals)
