"""mopo_loss: the multi-objective preference loss straight from hidden states.

weights w   from labels and multipliers alone        (mopo_weights)
log π(y|x)  of the sequences whose weight counts     (sequence_logprob: fused LM head, no [tokens, vocab] tensor)
loss        clone, contrast or regress               (mopo_objective)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.checks import check_choice
from mopo_kernels.fused_loss import fused_policy_loss
from mopo_kernels.head_ops import backend_for
from mopo_kernels.logprob import check_sequences, sequence_logprob, token_ids
from mopo_kernels.objective import (
    MOPOOutput,
    Normalize,
    PolicyStep,
    check_batch,
    check_ref_logp,
    mopo_objective,
    target_policy,
)
from mopo_kernels.policy_ops import PolicyTarget


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
    normalize: Normalize = "group",
    min_weight: float = 1e-5,
    index: Tensor | None = None,  # [S]
    average: bool = False,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_filter: float | Literal["auto"] | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    weight_grad_scale: float | None = None,
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
        ref_logp: log π_ref(y_i|x), needed by contrast and regress.
        lag_log_ratio: log ω_i = log π_lag(y_i|x) − log π_ref0(y_i|x), or None.
        policy_step: "clone", "contrast" or "regress".
        primary: column of the primary objective.
        normalize: "group", or "none" for the paper's printed form exp(s/τ − 1).
        min_weight: weight at or below which `clone` leaves a sequence out.
        index: where `hidden` and `target` hold only some sequences of the batch, their positions in `win_rate`, [S];
            the others count as left out (`clone` only). Skip them before the model runs, and the backbone is saved too.
        average: per-token mean instead of the sum in log π(y|x).
        bias, temperature, softcap, logit_scale, ignore_index, grad_filter, workspace_bytes, backend:
            as in `linear_logprob`.
        weight_grad_scale: what the loss will be multiplied by before `backward()` (1.0 if by nothing). Given, the
            gradient of `weight` is added straight to `weight.grad` (float32) while the loss is computed: no second
            [V, H] tensor where several batches accumulate. Its hooks, like those of DDP, see nothing of it, and where
            NaN inputs raise an error it holds them already.

    Returns:
        MOPOOutput; `loss` is differentiable in hidden, weight and bias, nothing else is. A backend with a tile engine
        forms the gradients in the forward already, scaled in the backward.

    Raises:
        ValueError: as `linear_logprob` and `mopo_objective`; an `index` that does not fit; a `weight_grad_scale` for a
            weight whose gradient cannot be summed in float32.
    """
    check_sequences(hidden, target)
    target = token_ids(target)
    batch = win_rate.shape[0]
    _check_index(index, sequences=hidden.shape[0], batch=batch, policy_step=policy_step)
    index = None if index is None else index.long()
    check_ref_logp(ref_logp, policy_step, batch)
    check_batch(win_rate, group, multipliers, tau, lag_log_ratio)
    check_choice("normalize", normalize, get_args(Normalize))
    policy = target_policy(win_rate, group, multipliers, tau=tau, lag_log_ratio=lag_log_ratio, normalize=normalize)
    kept = None
    if policy_step == "clone":
        kept = policy.weights > min_weight
        if index is not None:
            kept = torch.zeros_like(kept).index_copy(0, index, kept[index])
        here = kept if index is None else kept[index]
        target = target.masked_fill(~here.unsqueeze(-1), ignore_index)

    options: dict[str, Any] = {
        "average": average,
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "grad_filter": grad_filter,
        "workspace_bytes": workspace_bytes,
    }
    linearised = None
    name = backend_for(hidden, weight, backend, workspace_bytes)
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if name == "reference" and weight_grad_scale is not None:
        raise ValueError("weight_grad_scale needs a backend with an engine, and this is 'reference'; leave it out")
    if name != "reference" and torch.is_grad_enabled() and differentiable:
        labels = PolicyTarget.of(policy, policy_step, tau, ref_logp)
        linearised, logp = fused_policy_loss(
            hidden,
            weight,
            target,
            labels if index is None else labels.take(index),
            policy_step,
            backend=name,
            weight_grad_scale=weight_grad_scale,
            **options,
        )
    else:
        logp = sequence_logprob(
            hidden,
            weight,
            target,
            backend=backend,
            **options,
        )
    if index is not None:
        logp = logp.new_zeros(batch).index_copy(0, index, logp)
    if kept is not None:
        logp = logp.masked_fill(~kept, torch.nan)
    output = mopo_objective(
        logp,
        win_rate,
        group,
        multipliers,
        tau=tau,
        eps=eps,
        ref_logp=ref_logp,
        lag_log_ratio=lag_log_ratio,
        policy_step=policy_step,
        primary=primary,
        normalize=normalize,
        kept=kept,
        backend=backends.if_it_has("objective", backend),
    )
    loss = output.loss if linearised is None else output.loss + (linearised - linearised.detach())
    return replace(output, loss=loss, logp=output.logp.detach())


def _check_index(index: Tensor | None, *, sequences: int, batch: int, policy_step: str) -> None:
    if index is None:
        if sequences != batch:
            raise ValueError(
                f"win_rate has {batch} rows and hidden {sequences} sequences; give one row per sequence, or `index`"
            )
        return
    if policy_step != "clone":
        raise ValueError(f"index goes with policy_step='clone' only; {policy_step!r} needs every response of a group")
    if index.shape != (sequences,) or index.is_floating_point():
        raise ValueError(f"index must hold {sequences} integers, one per sequence of hidden; got {list(index.shape)}")
    if torch.compiler.is_compiling() or sequences == 0:
        return
    if index.min() < 0 or index.max() >= batch or index.unique().numel() != sequences:
        raise ValueError(f"index must hold distinct positions in [0, {batch})")
