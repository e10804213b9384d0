"""The preference loss: the door of the objective.

    label_statistics  weights and estimates, from labels and multipliers alone   (objective/target.py)
    log π(y|x)        of the sequences whose weight counts                        (head/: no [tokens, vocab] tensor)
    loss              clone, contrast or regress                                  (objective/steps.py)

`mopo_loss` does all three from hidden states, `policy_loss` the last two, `mopo_objective` the first and the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from mopo_kernels import backends
from mopo_kernels.backends.batch import Labels
from mopo_kernels.backends.transforms import refuse_transforms
from mopo_kernels.checks import (
    check_choice,
    check_devices,
    check_finite,
    check_index,
    check_label_shapes,
    check_label_values,
    check_per_response,
    check_reference,
    check_sequences,
    check_target,
    in_vocabulary,
    is_true,
    token_ids,
)
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.policy import linear_policy_loss
from mopo_kernels.head.ranks import RowsOf, Split
from mopo_kernels.logprob import enter, sequence_totals
from mopo_kernels.objective.steps import STEPS, PolicyStep, step_target
from mopo_kernels.objective.target import LabelStatistics, measure

_SCALES = ("temperature", "softcap", "logit_scale")
HEAD_OPTIONS = ("average", "bias", *_SCALES, "ignore_index", "grad_sampling", "workspace_bytes")


@dataclass(frozen=True)
class MOPOOutput:
    """One evaluation of the objective. Only `loss` carries gradients, and `logp` where the caller gave it."""

    loss: Tensor  # [] in the dtype of logp
    logp: Tensor  # [B]
    weights: Tensor  # [B] w_i
    win_rates: Tensor  # [K] G_k, the primary's too; NaN for an objective that the batch does not label
    lower_bounds: Tensor  # [K] LB_k
    chi: Tensor  # [K] temperature of the bound: inf at eps = 0, 0 where the KL ball reaches the smallest value
    ess: Tensor  # [] effective sample size (sum w)^2 / sum w^2, at most B
    kl: Tensor  # [] mean over groups of KL(w || r): how far the target policy lies from the reference on this batch
    dropped_mass: Tensor  # [] weight of the responses whose logp was not computed, mean over groups

    @classmethod
    def of(cls, loss: Tensor, logp: Tensor, labels: LabelStatistics, kept: Tensor | None) -> MOPOOutput:
        reported = labels.reported()
        dropped = reported.kl.new_zeros(())
        if kept is not None:
            dropped = labels.groups.mean_of_sums(labels.weights.masked_fill(kept, 0)).to(labels.dtype)
        return cls(
            loss=loss,
            logp=logp,
            weights=reported.weights,
            win_rates=reported.win_rates,
            lower_bounds=reported.lower_bounds,
            chi=reported.chi,
            ess=reported.ess,
            kl=reported.kl,
            dropped_mass=dropped,
        )


pytree.register_dataclass(MOPOOutput)


@dataclass(frozen=True)
class StepCall:
    """What a policy step is asked for, beside labels and head."""

    policy_step: PolicyStep
    ref_logp: Tensor | None  # [B]
    min_weight: float
    index: Tensor | None  # [S]

    def check(self, hidden: Tensor, batch: int) -> None:
        """Raise for all but values of ref_logp."""
        check_choice("policy_step", self.policy_step, STEPS)
        check_devices("hidden", hidden, ref_logp=self.ref_logp, index=self.index)
        check_index(self.index, sequences=hidden.shape[0], batch=batch, policy_step=self.policy_step)
        check_reference(self.policy_step, self.ref_logp, batch)

    def check_values(self, inputs: HeadInputs, call: HeadCall, *valid: Tensor) -> bool:
        """Raise for a target or ref_logp that is refused; whether `valid` holds too, in the same read-back."""
        vocab = call.columns(inputs.weight)
        finite = [] if self.ref_logp is None else [self.ref_logp.isfinite().all()]
        if is_true(in_vocabulary(inputs.target, vocab, call.ignore_index), *finite, *valid):
            return True
        check_target(inputs.target, vocab, call.ignore_index)
        check_finite("ref_logp", self.ref_logp)
        return False

    def kept(self, weights: Tensor) -> Tensor | None:  # [B] bool
        """The responses whose log-probability is computed; None for all."""
        if self.policy_step != "clone":
            return None
        kept = weights > self.min_weight
        if self.index is not None:
            kept = torch.zeros_like(kept).index_copy(0, self.index.long(), kept[self.index])
        return kept


def mopo_loss(
    hidden: Tensor,  # [B, L, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [B, L]
    win_rate: Tensor,  # [B, K]
    group: Tensor,  # [B]
    multipliers: Tensor,  # [K]
    *,
    tau: float,
    eps: float = 0.0,
    ref_logp: Tensor | None = None,  # [B]
    lag_log_ratio: Tensor | None = None,  # [B]
    policy_step: PolicyStep = "clone",
    primary: int = 0,
    min_weight: float = 1e-5,
    index: Tensor | None = None,  # [S]
    average: bool = False,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_sampling: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    rows: RowsOf = "same",
) -> MOPOOutput:
    """MOPO policy step (arXiv 2505.10892, Eq. 3 and 7) on a batch of groups of responses.

    With w_i = softmax_group(Σ_k λ_k v_ik / τ + log ω_i), the optimal policy's weight of response i in its group:

        clone     −mean_groups Σ_i w_i log π(y_i|x)
        contrast  −mean_groups Σ_i w_i log softmax_group(h)_i               h_i = log π(y_i|x) − log π_ref(y_i|x)
        regress    mean_groups mean_{i<j} (h_i − h_j − (n−1)/n · (s_i − s_j)/τ)²

    The weights depend on the labels only, so under `clone` sequences of weight ≤ `min_weight` are left out before the
    LM-head product: their `logp` is NaN and their weight is reported as `dropped_mass`.

    Args:
        hidden: last hidden states [B, L, H]; position l predicts `target[:, l]`.
        weight: LM head [V, H].
        target: token ids [B, L]; prompt and padding positions hold `ignore_index`.
        win_rate: v_ik in [0, 1], NaN where nobody labelled (see `win_rate_from_pairs`, `win_rate_from_comparisons`).
        group: integer id of the prompt of each response; every group has at least two.
        multipliers: λ ≥ 0, 1 at the primary (see `MOPODual`, `solve_dual`).
        tau: temperature τ > 0 of the KL penalty.
        eps: radius ε ≥ 0 of the robust bound's KL ball.
        ref_logp: log π_ref(y_i|x), needed by contrast and regress; under a lag contrast takes that of π_ref0 (its
            weights carry ω), regress that of π_lag.
        lag_log_ratio: log ω_i = log π_lag(y_i|x) − log π_ref0(y_i|x), or None.
        policy_step: "clone", "contrast" or "regress".
        primary: column of the primary objective.
        min_weight: weight at or below which `clone` leaves a sequence out.
        index: where `hidden` and `target` hold only some sequences of the batch, their positions in `win_rate`, [S];
            the others count as left out (`clone` only). Skip them before the model runs, and the backbone is saved too.
        average: per-token mean instead of the sum in log π(y|x).
        grad_sampling: ε of sampled gradients, as in `linear_logprob`; the loss and every coefficient stay exact.
        bias, temperature, softcap, logit_scale, ignore_index, workspace_bytes, backend, vocab_group, rows: as in
            `linear_logprob`.

    Returns:
        MOPOOutput; `loss` is differentiable in hidden, weight and bias, nothing else is. An engine forms the gradients
        in the forward already, scaled in the backward; sampled ones are formed in the backward.

    Raises:
        ValueError: as `linear_logprob` and `mopo_objective`; an `index` that does not fit. All but NaN hidden states,
            weights or biases is refused before any product is formed.
    """
    step = StepCall(policy_step, ref_logp, min_weight, index)
    inputs, call = _enter(
        HeadInputs(hidden, weight, bias, target),
        step,
        win_rate.shape[:1].numel(),
        backend,
        Split(vocab_group, rows, (win_rate, group, multipliers, ref_logp, lag_log_ratio, index)),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
        average=average,
        grad_sampling=grad_sampling,
    )
    labels = Labels(win_rate, group, multipliers, lag_log_ratio, tau, eps, primary)
    check_label_shapes(labels)
    check_devices("hidden", hidden, win_rate=win_rate)
    statistics = measure(labels, backends.if_it_has("label_statistics", backend))
    if not step.check_values(inputs, call, statistics.values.valid):
        check_label_values(labels)
    return _policy_loss(inputs, call, statistics, step)


def policy_loss(
    hidden: Tensor,  # [S, L, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [S, L]
    labels: LabelStatistics,
    *,
    ref_logp: Tensor | None = None,  # [B]
    policy_step: PolicyStep = "clone",
    min_weight: float = 1e-5,
    index: Tensor | None = None,  # [S]
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    rows: RowsOf = "same",
    **options: Any,
) -> MOPOOutput:
    """`mopo_loss` of a batch whose `label_statistics` are there already.

    For trainers: the statistics say which responses count before the model runs, and feed the multipliers too. They
    must be on the device of `hidden`. Arguments, errors and result are `mopo_loss`'s; `options` are those of the head
    (average, bias, temperature, softcap, logit_scale, ignore_index, grad_sampling, workspace_bytes).
    """
    check_devices("hidden", hidden, labels=labels.slot)
    for name in options:
        if name not in HEAD_OPTIONS:
            raise TypeError(f"policy_loss() has no option {name!r}; those of the head: {', '.join(HEAD_OPTIONS)}")
    step = StepCall(policy_step, ref_logp, min_weight, index)
    inputs = HeadInputs(hidden, weight, options.pop("bias", None), target)
    split = Split(vocab_group, rows, (labels.weights, labels.slot, ref_logp, index))
    inputs, call = _enter(inputs, step, len(labels.slot), backend, split, **options)
    step.check_values(inputs, call)
    return _policy_loss(inputs, call, labels, step)


def _enter(
    inputs: HeadInputs, step: StepCall, batch: int, backend: str | None, split: Split, **options: Any
) -> tuple[HeadInputs, HeadCall]:
    """Head and step, checked but for the values of tensors, and the call with who runs it."""
    check_sequences(inputs.hidden, inputs.target)
    step.check(inputs.hidden, batch)
    call = HeadCall.of(**{"temperature": 1.0, "ignore_index": -100, **options})
    return enter(inputs._replace(target=token_ids(inputs.target)), call, backend, split)


def _policy_loss(inputs: HeadInputs, call: HeadCall, labels: LabelStatistics, step: StepCall) -> MOPOOutput:
    """The loss of checked arguments."""
    aim, kept, index = step_target(step.policy_step, labels, step.ref_logp), step.kept(labels.weights), step.index
    if kept is not None:
        here = kept if index is None else kept[index]
        inputs = inputs._replace(target=inputs.target.masked_fill(~here.unsqueeze(-1), call.ignore_index))
        aim = aim if index is None else aim.take(index)
    if call.fuses:
        loss, logp, *_ = linear_policy_loss(*inputs, aim.packed(), step.policy_step, call.flat())
    else:
        logp = sequence_totals(inputs, call)
        loss = STEPS[step.policy_step].loss(logp.double(), aim).to(logp.dtype)
    logp = logp.detach()
    if kept is not None:
        logp = logp if index is None else logp.new_zeros(kept.shape).index_copy(0, index.long(), logp)
        logp = logp.masked_fill(~kept, torch.nan)
    return MOPOOutput.of(loss, logp, labels, kept)


def mopo_objective(
    logp: Tensor,  # [B] log pi(y_i | x), sums over the response's tokens
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor,  # [B] int64, any ids; every group has at least two responses
    multipliers: Tensor,  # [K], 1 at the primary
    *,
    tau: float,
    eps: float = 0.0,
    ref_logp: Tensor | None = None,  # [B] log pi_ref(y_i | x), for contrast and regress
    lag_log_ratio: Tensor | None = None,  # [B] log pi_lag - log pi_ref0
    policy_step: PolicyStep = "clone",
    primary: int = 0,
    kept: Tensor | None = None,  # [B] bool, responses whose logp was computed (clone only)
    backend: str | None = None,
) -> MOPOOutput:
    """The MOPO loss of a batch and the estimates that move the multipliers, from sequence log-probabilities.

    The formulas are `mopo_loss`'s. `kept` leaves responses out of the `clone` loss, those whose weight is too small to
    be worth a forward pass; their weight is reported as `dropped_mass`. `eps` is the radius of the bounds' KL ball, see
    `robust_bound`.

    The loss is in the dtype of `logp`, differentiable in logp and ref_logp any number of times; weights and estimates
    are in the dtype of `win_rate`. `backend` is a name in `mopo_kernels.backends.BACKENDS`, or None for the table's
    choice. Raises ValueError for malformed arguments, unless called under torch.compile, where values cannot be looked
    at. Source: paper, Eq. 7 (clone); contrast is DPO's and regress is IPO's loss with several objectives (ours).
    """
    refuse_transforms("mopo_objective", "reference", logp, win_rate, group, multipliers, ref_logp, lag_log_ratio)
    labels = Labels(win_rate, group, multipliers, lag_log_ratio, tau, eps, primary)
    check_label_shapes(labels)
    responses = win_rate.shape[0]
    check_choice("policy_step", policy_step, STEPS)
    check_reference(policy_step, ref_logp, responses)
    check_per_response(responses, logp=logp, kept=kept)
    check_devices("logp", logp, win_rate=win_rate, ref_logp=ref_logp, kept=kept)
    if policy_step != "clone" and kept is not None:
        raise ValueError(f"policy_step={policy_step!r} needs every response's logp: kept works with 'clone' only")

    statistics = measure(labels, backend)
    used = (logp if kept is None else torch.where(kept, logp, 0)).double()
    compared = used.detach() if ref_logp is None else used.detach() - ref_logp.detach()
    if not is_true(statistics.values.valid, compared.isfinite().all()):
        check_finite("logp", logp, kept)
        check_finite("ref_logp", ref_logp, kept)
        check_label_values(labels)
    loss = STEPS[policy_step].loss(used, step_target(policy_step, statistics, ref_logp))
    return MOPOOutput.of(loss.to(logp.dtype), logp, statistics, kept)


def mopo_weights(
    win_rate: Tensor,  # [B, K] in [0, 1], NaN = unlabelled
    group: Tensor,  # [B] int64, any ids
    multipliers: Tensor,  # [K], 1 at the primary
    *,
    tau: float,
    lag_log_ratio: Tensor | None = None,  # [B] log pi_lag - log pi_ref0
) -> Tensor:  # [B]
    """Weight of each response, w_i = softmax_group(s_i / tau + log omega_i); sums to 1 in every group. No gradient.

    Raises ValueError for malformed labels, groups, multipliers or tau. Source: paper, Eq. 3.
    """
    labels = Labels(win_rate, group, multipliers, lag_log_ratio, tau, 0.0, 0)
    check_label_shapes(labels)
    statistics = measure(labels)
    if not is_true(statistics.values.valid):
        check_label_values(labels, any_primary=True)
    return statistics.reported().weights
