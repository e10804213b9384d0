"""Validators, one per concept: every public call runs its own once, first, before any work.

Values of tensors are looked at in eager mode only: under torch.compile there are none.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Iterable

import torch
from torch import Tensor

from mopo_kernels.backends.batch import Labels

# ------------------------------------------------------------------------------------------------------------ settings

LEAST_GRAD_SAMPLING = 2.0**-13  # up to its inverse the running sum of sampled gradients is exact (backends/fold.py)


def is_true(*conditions: Tensor) -> bool:
    """Whether all hold, in one read-back; taken for granted under torch.compile."""
    if torch.compiler.is_compiling():
        return True
    first, *others = (condition.bool() for condition in conditions)
    for condition in others:
        first = first & condition
    return bool(first)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{hint}")


def check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number; got {value}")


def check_tau(tau: float) -> None:
    check_positive(tau=tau)


def check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a number >= 0 (0 switches the robust bound off); got {eps}")


def check_grad_sampling(grad_sampling: float | None) -> None:
    is_number = isinstance(grad_sampling, numbers.Real) and not isinstance(grad_sampling, bool)
    if grad_sampling is None or (is_number and 0 < grad_sampling < 1 and grad_sampling >= LEAST_GRAD_SAMPLING):
        return
    kind = "" if is_number else f", a {type(grad_sampling).__name__}: give a float"
    raise ValueError(
        f"grad_sampling must be a number between {LEAST_GRAD_SAMPLING:g} and 1 (0.015625, that is 1/64, is a good "
        f"start), or None for exact gradients; got {reprlib.repr(grad_sampling)}{kind}"
    )


# -------------------------------------------------------------------------------------------------------------- labels


def check_probabilities(name: str, x: Tensor) -> None:
    _check_table(name, x)
    if not torch.compiler.is_compiling():
        _check_unit_interval(name, x)


def check_group_ids(group: Tensor, num_responses: int) -> None:
    if group.shape != (num_responses,) or group.dtype != torch.int64 or num_responses == 0:
        raise ValueError(
            f"group must be an int64 tensor with one id for each of the {num_responses} (at least 2) responses; "
            f"got {group.dtype} {tuple(group.shape)}"
        )


def check_group_sizes(group: Tensor, size: Tensor) -> None:
    alone = size < 2
    if alone.any():
        raise ValueError(
            f"group {group[alone][0].item()} has one response: a preference needs two; "
            "drop the prompt or add a response"
        )


def check_lag_finite(lag_log_ratio: Tensor | None) -> None:
    if lag_log_ratio is not None and not torch.compiler.is_compiling() and not lag_log_ratio.isfinite().all():
        raise ValueError("lag_log_ratio must be finite: clip it where a log-probability is -inf or NaN")


def check_primary(primary: int, num_objectives: int) -> None:
    if not 0 <= primary < num_objectives:
        raise ValueError(f"primary must be an objective 0 .. {num_objectives - 1}; got {primary}")


def check_label_shapes(labels: Labels) -> None:
    """All of labels, groups, multipliers and settings that can be told without looking at a tensor's values."""
    _check_table("win_rate", labels.win_rate)
    responses, objectives = labels.win_rate.shape
    check_group_ids(labels.group, responses)
    check_per_response(responses, lag_log_ratio=labels.lag_log_ratio)
    check_tau(labels.tau)
    check_eps(labels.eps)
    if labels.multipliers.shape != (objectives,):
        raise ValueError(
            f"multipliers must have one entry for each of win_rate's {objectives} objectives, the primary's too; "
            f"got {tuple(labels.multipliers.shape)}"
        )
    check_primary(labels.primary, objectives)
    tensors = {"group": labels.group, "multipliers": labels.multipliers, "lag_log_ratio": labels.lag_log_ratio}
    check_devices("win_rate", labels.win_rate, **tensors)


def check_label_values(labels: Labels, *, any_primary: bool = False) -> None:
    """Raise for the value that a batch's `valid` flag speaks of; weights do not ask which objective is the primary."""
    _check_unit_interval("win_rate", labels.win_rate)
    _, inverse, counts = labels.group.unique(return_inverse=True, return_counts=True)
    check_group_sizes(labels.group, counts[inverse])
    multipliers, primary = labels.multipliers, labels.primary
    if not ((multipliers >= 0) & multipliers.isfinite()).all():
        raise ValueError(f"multipliers must be finite and >= 0; got {multipliers.tolist()}")
    if multipliers[primary] != 1 and not any_primary:
        raise ValueError(
            f"multipliers must be 1 at the primary objective {primary}; got {multipliers[primary].item():g}: "
            "divide all of them by it, or change tau"
        )
    check_lag_finite(labels.lag_log_ratio)
    if not any_primary:
        raise RuntimeError("the labels' backend refuses values in which nothing is wrong: please report this")


def check_per_response(num_responses: int, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.shape != (num_responses,):
            raise ValueError(
                f"{name} must have one entry for each of the {num_responses} responses; got {tuple(x.shape)}"
            )


def check_devices(name: str, like: Tensor, **tensors: Tensor | None) -> None:
    for other, x in tensors.items():
        if x is not None and x.device != like.device:
            raise ValueError(f"{other} is on {x.device} and {name} on {like.device}; move one of them")


def _check_table(name: str, x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [rows, objectives]; got {x.dtype} {tuple(x.shape)}")


def _check_unit_interval(name: str, x: Tensor) -> None:
    wrong = (x < 0) | (x > 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must lie in [0, 1], or be NaN where unlabelled; got {x[row, column].item():g} "
            f"in row {row}, objective {column}"
        )


# --------------------------------------------------------------------------------------------------------- policy step


def check_reference(policy_step: str, ref_logp: Tensor | None, num_responses: int) -> None:
    if policy_step != "clone" and ref_logp is None:
        raise ValueError(f"policy_step={policy_step!r} needs ref_logp, the reference policy's log-probabilities")
    check_per_response(num_responses, ref_logp=ref_logp)


def check_finite(name: str, x: Tensor | None, counts: Tensor | None = None) -> None:
    """Raise where a response that counts has a log-probability that is none."""
    if x is None:
        return
    bad = ~x.isfinite() if counts is None else counts & ~x.isfinite()
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name} of response {row} is {x[row].item()}: the policy's hidden states or logits are not finite, "
            "or the response is empty"
        )


def check_index(index: Tensor | None, *, sequences: int, batch: int, policy_step: str) -> None:
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


# ------------------------------------------------------------------------------------------------------------- LM head


def check_head(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *, is_split: bool = False) -> None:
    """Shapes, dtypes and devices of a head's tensors, hidden [*, H] and target [*]."""
    _check_floating(hidden=hidden, weight=weight)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "ZeRO-3 has taken the weight away: call inside the forward pass of the module that owns it, which "
                "gathers it for the backward pass too"
            )
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit: [*, H] and [V, H]")
    if 0 in weight.shape[int(is_split) :]:  # a process may hold no token of a split head
        raise ValueError(f"weight has shape {list(weight.shape)}; a head needs at least one token and one feature")
    if hidden.shape[:-1] != target.shape:
        raise ValueError(f"target has shape {list(target.shape)}; hidden {list(hidden.shape)} needs one target per row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; weight {list(weight.shape)} needs [{weight.shape[0]}]")
    is_cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype)
    if hidden.dtype != weight.dtype and not is_cast:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them")
    check_devices("hidden", hidden, weight=weight, target=target, bias=bias)


def check_logits(logits: Tensor, target: Tensor) -> None:
    if logits.ndim < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(f"target has shape {list(target.shape)}; logits {list(logits.shape)} need one target per row")
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}; they need at least one token")
    _check_floating(logits=logits)
    check_devices("logits", logits, target=target)


def check_sequences(hidden: Tensor, target: Tensor) -> None:
    """Raise unless hidden is [B, L, H] and target [B, L]."""
    if hidden.ndim != 3 or target.ndim != 2:
        raise ValueError(
            f"hidden and target have shapes {list(hidden.shape)} and {list(target.shape)}; sequences need "
            "[B, L, H] and [B, L] (linear_logprob takes flat rows)"
        )


def token_ids(target: Tensor) -> Tensor:
    """target as int64, in which any ignore_index fits.

    Raises:
        ValueError: these are no integers.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target has dtype {target.dtype}; give integer token ids")
    return target.long()


def in_vocabulary(target: Tensor, vocab: int, ignore_index: int) -> Tensor:  # [] bool
    """Whether every target is a token or ignored."""
    return (((target >= 0) & (target < vocab)) | (target == ignore_index)).all()


def check_target(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise for the target that is neither a token nor ignored, if there is one."""
    if not is_true(in_vocabulary(target, vocab, ignore_index)):
        bad = target[(target != ignore_index) & ((target < 0) | (target >= vocab))]
        raise ValueError(
            f"target holds {int(bad[0])}, outside [0, {vocab}) for a head of {vocab} rows; "
            f"rows that do not count take ignore_index={ignore_index}"
        )


def check_result(logp: Tensor, *, is_split: bool = False, **inputs: Tensor | None) -> None:
    """A NaN log-probability of a counted row comes from a NaN or infinite input, or a mask of all: name which."""
    if torch.compiler.is_compiling() or not logp.detach().isnan().any():
        return
    given = {name: x.detach() for name, x in inputs.items() if x is not None}
    for name, x in given.items():
        masks = x == -math.inf if name in ("bias", "logits") else False
        if not (x.isfinite() | masks).all():
            what = "NaN" if x.isnan().any() else "infinity"
            raise ValueError(f"{name} holds {what} in rows that count; find the step that diverged before this one")
    if is_split:
        raise ValueError(
            "another process's part of the LM head has NaN, infinity or overflowing logits, or all mask every token"
        )
    for name in ("bias", "logits"):
        if name in given and (given[name] == -math.inf).all(-1).any():
            raise ValueError(f"{name} masks every token of a row that counts (-inf); leave one, or ignore its target")
    raise ValueError(f"the logits of {', '.join(inputs)} overflow {logp.dtype}; scale the inputs down")


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; give a floating-point tensor")
