"""Log-probabilities of target tokens from hidden states and an LM head, or from logits.

The three functions here validate, flatten leading dimensions and hand over to the backend that
`mopo_kernels.backends` chooses: `reference`, or the tile engine (head_ops.py) with that backend's fold kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mopo_kernels import backends, head_ops, objective_ops, policy_ops, token_ops
from mopo_kernels.backends import reference
from mopo_kernels.checks import check_choice


def linear_logprob(
    hidden: Tensor,  # [*, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [*]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: Literal["none", "sum", "mean"] = "none",
    grad_filter: float | Literal["auto"] | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:  # [*], or [] with a reduction
    """log softmax(hidden · weightᵀ) at the target token, per row; differentiable in hidden, weight and bias.

        z = (hidden · weightᵀ + bias) · logit_scale;   z = softcap · tanh(z / softcap);   z = z / temperature
        logp = z[target] − log Σ_v exp z_v

    Args:
        hidden: hidden states [*, H], any floating dtype. Rows whose target is ignored are not read.
        weight: LM head [V, H], same dtype and device as `hidden`.
        target: token ids [*], integers in [0, V) or `ignore_index`.
        bias: [V] or None. −inf masks a token out of the vocabulary.
        temperature: > 0, divides the logits.
        softcap: > 0 or None, bounds the logits smoothly (Gemma 2).
        logit_scale: multiplies the logits before the softcap (Cohere; Granite's divisor is 1 / logit_scale).
        ignore_index: target value of rows that do not count.
        reduction: "sum" or "mean" over the rows that count (0 if none does). What every row's gradient is multiplied by
            is then known beforehand, so gradients are formed while the logits are there: 6·N·H·V flops for N rows. With
            "none" a trainable head's logits are formed again in the backward, 8·N·H·V, unless all of them, N × V, fit
            `workspace_bytes`.
        grad_filter: in (0, 1), "auto" (eps of the dtype / 32: 2^-12 for bfloat16) or None (exact gradients). The
            backward may skip blocks of 128 × 128 logits whose probabilities are all below it: approximate, opt-in.
            Measured with SmolLM2-135M on HH-RLHF text (1024 tokens × 49152, float32, CPU): at 2^-12 96% of the blocks
            stay, the gradients of hidden and weight are off by 1e-3 and 2e-4, and no time is saved; at 2^-8 43%, 4e-2
            and 8e-3, and hardly any. With the vocabulary ordered by mean logit 81% and 36% stay, errors are alike,
            and the second saves a fifth. So: for large, peaked models, whose blocks are emptier.
        workspace_bytes: bound on the temporaries, logits above all, beside the gradients (weight's is summed in
            float32); None is 64 MiB on CPUs, 512 MiB on GPUs. More makes blocks of more rows, faster to multiply.
        backend: a name in `mopo_kernels.backends.BACKENDS`, or None for the table's choice.

    Returns:
        logp [*], natural logarithm, float32 (float64 for float64 inputs), 0 where the target is ignored; or its sum or
        mean [].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a target out of range; NaN hidden states or weights.
    """
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    target = token_ids(target)
    check_linear(
        *(hidden, weight, target, bias),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
    )
    hidden, weight, bias = autocast(hidden, weight, bias)
    name = head_ops.backend_for(hidden, weight, backend, workspace_bytes)
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    is_fused = reduction != "none" and name != "reference" and torch.is_grad_enabled() and differentiable
    run: Callable[..., Tensor]
    if name == "reference":
        run = reference.linear_logprob
    elif is_fused:
        run = partial(policy_ops.run_total_logprob, average=reduction == "mean", backend=name)
    else:
        run = partial(head_ops.run_linear_logprob, backend=name)
    logp = run(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        bias=bias,
        temperature=float(temperature),
        softcap=softcap,
        logit_scale=float(logit_scale),
        ignore_index=ignore_index,
        grad_filter=filter_threshold(grad_filter, weight.dtype),
        workspace_bytes=workspace_bytes,
    )
    check_result(logp, hidden=hidden, weight=weight, bias=bias)
    if is_fused:
        return logp
    if reduction == "none":
        return logp.reshape(target.shape)
    total = logp.sum(dtype=torch.float64)
    return (total if reduction == "sum" else total / (target != ignore_index).sum().clamp(min=1)).to(logp.dtype)


def token_logprob(
    logits: Tensor,  # [*, V]
    target: Tensor,  # [*]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> Tensor:  # [*]
    """log softmax(logits) at the target token, per row; differentiable in `logits`.

    For models that hand out logits only; `linear_logprob` needs far less memory where the hidden states can be had.

    Args:
        logits: [*, V], any floating dtype. Rows whose target is ignored are not read. Leading dimensions that do not
            collapse, as those of logits[:, :-1], cost a copy: ignore the last position's target instead.
        target, temperature, softcap, ignore_index, backend: as in `linear_logprob`.
        overwrite_logits: let the backward write the gradient over the logits, which saves a second [*, V] tensor. For
            logits that nobody reads afterwards: an operator that saved them raises an error in its backward, as after
            any operation in place. Without effect on the reference backend and under torch.compile.

    Returns:
        logp [*], natural logarithm, float32 (float64 for float64 logits), 0 where the target is ignored.

    Raises:
        ValueError: shapes that do not fit; a target out of range; NaN logits.
    """
    if logits.ndim < 1 or logits.shape[:-1] != target.shape:
        raise ValueError(f"target has shape {list(target.shape)}; logits {list(logits.shape)} need one target per row")
    target = token_ids(target)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}; they need at least one token")
    _check_floating(logits=logits)
    _check_scales(temperature, softcap)
    _check_target(target, logits.shape[-1], ignore_index)
    name = backends.choose("token_logprob", logits.device.type, backend).backend
    run = reference.token_logprob
    if name != "reference":
        run = partial(token_ops.run_token_logprob, overwrite_logits=overwrite_logits, backend=name)
    logp = run(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        temperature=float(temperature),
        softcap=softcap,
        ignore_index=ignore_index,
    )
    check_result(logp, logits=logits)
    return logp.reshape(target.shape)


def sequence_logprob(
    hidden: Tensor,  # [B, L, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [B, L]
    *,
    average: bool = False,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_filter: float | Literal["auto"] | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:  # [B]
    """Sum over each sequence of `linear_logprob`: log π(y|x) when only the response's tokens are targets.

    Args:
        hidden: [B, L, H]; position l predicts `target[:, l]` (shift the labels before the call).
        average: divide by the number of tokens that count (0 for a sequence without any).
        others: as in `linear_logprob`.

    Returns:
        logp [B], natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: as `linear_logprob`, and for tensors that are not [B, L, H] and [B, L].
    """
    check_sequences(hidden, target)
    target = token_ids(target)
    logp = linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        grad_filter=grad_filter,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    name = backends.choose("sequence_sums", logp.device.type, backends.if_it_has("sequence_sums", backend)).backend
    run = reference.sequence_sums if name == "reference" else partial(objective_ops.run_sequence_sums, backend=name)
    sums, counts = run(logp, target, ignore_index)
    return (sums / counts.clamp(min=1) if average else sums).to(logp.dtype)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    workspace_bytes: int | None,
) -> None:
    """Raise unless these are arguments of `linear_logprob`."""
    _check_tensors(hidden, weight, target, bias)
    _check_scales(temperature, softcap, logit_scale)
    _check_target(target, weight.shape[0], ignore_index)
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes={workspace_bytes} must be positive, or None for the backend's choice")


def check_sequences(hidden: Tensor, target: Tensor) -> None:
    """Raise unless hidden is [B, L, H] and target [B, L]."""
    if hidden.ndim != 3 or target.ndim != 2:
        raise ValueError(
            f"hidden and target have shapes {list(hidden.shape)} and {list(target.shape)}; sequences need "
            "[B, L, H] and [B, L] (linear_logprob takes flat rows)"
        )


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs as torch.autocast would hand them to a linear layer."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def filter_threshold(grad_filter: float | Literal["auto"] | None, dtype: torch.dtype) -> float | None:
    """The probability below which a block may be skipped; "auto" is what the dtype's gradient cannot resolve."""
    if grad_filter == "auto":
        return torch.finfo(dtype).eps / 32
    if grad_filter is not None and not 0 < grad_filter < 1:
        raise ValueError(f"grad_filter={grad_filter} must lie in (0, 1), be 'auto' or None")
    return grad_filter


def _check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; give a floating-point tensor")


def _check_tensors(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    _check_floating(hidden=hidden, weight=weight)
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} do not fit: [*, H] and [V, H]")
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}; a head needs at least one token and one feature")
    if hidden.shape[:-1] != target.shape:
        raise ValueError(f"target has shape {list(target.shape)}; hidden {list(hidden.shape)} needs one target per row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; weight {list(weight.shape)} needs [{weight.shape[0]}]")
    is_cast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype)
    if hidden.dtype != weight.dtype and not is_cast:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; move one of them")


def _check_scales(temperature: float, softcap: float | None, logit_scale: float = 1.0) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a positive number")


def token_ids(target: Tensor) -> Tensor:
    """target as int64, in which any ignore_index fits.

    Raises:
        ValueError: these are no integers.
    """
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target has dtype {target.dtype}; give integer token ids")
    return target.long()


def _check_target(target: Tensor, vocab: int, ignore_index: int) -> None:
    target = token_ids(target)
    if torch.compiler.is_compiling() or target.numel() == 0:
        return
    counts = target[target != ignore_index]
    bad = counts[(counts < 0) | (counts >= vocab)]
    if bad.numel():
        raise ValueError(
            f"target holds {int(bad[0])}, outside [0, {vocab}) for a head of {vocab} rows; "
            f"rows that do not count take ignore_index={ignore_index}"
        )


def check_result(logp: Tensor, **inputs: Tensor | None) -> None:
    """A NaN log-probability of a counted row can only come from a NaN or infinite input: name the input."""
    if torch.compiler.is_compiling() or not logp.detach().isnan().any():
        return
    for name, tensor in inputs.items():
        if tensor is not None and not tensor.detach().isfinite().all():
            what = "NaN" if tensor.detach().isnan().any() else "infinity"
            raise ValueError(f"{name} holds {what} in rows that count; find the step that diverged before this one")
    raise ValueError(f"the logits of {', '.join(inputs)} overflow {logp.dtype}; scale the inputs down")
