"""Log-probabilities of target tokens from hidden states and an LM head, or from logits: the door of the head.

The functions here check their arguments, flatten leading dimensions and hand over to the backend that
`mopo_kernels.backends` chooses: `reference`, or an engine (head/engines.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends import reference
from mopo_kernels.backends.reference import RowValues
from mopo_kernels.backends.transforms import refuse_transforms
from mopo_kernels.checks import (
    check_choice,
    check_head,
    check_logits,
    check_result,
    check_sequences,
    check_target,
    token_ids,
)
from mopo_kernels.head.call import HeadCall, HeadInputs, Outputs
from mopo_kernels.head.engines import choose_backend
from mopo_kernels.head.ops import run_head_logprob
from mopo_kernels.head.policy import run_total_logprob
from mopo_kernels.head.ranks import RowsOf, Split, agree, run_own_rows, take_part
from mopo_kernels.head.sampled import run_sampled_logprob
from mopo_kernels.head.tokens import run_logits_logprob
from mopo_kernels.objective import ops


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
    return_lse: bool = False,
    return_entropy: bool = False,
    return_hit: bool = False,
    grad_sampling: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    rows: RowsOf = "same",
) -> Any:  # Tensor [*], or [] with a reduction; a tuple of it and what else is asked for
    """log softmax(hidden · weightᵀ) at the target token, per row; differentiable in hidden, weight and bias.

        z = (hidden · weightᵀ + bias) · logit_scale;   z = softcap · tanh(z / softcap);   z = z / temperature
        lse = log Σ_v exp z_v;   logp = z[target] − lse;   entropy = lse − Σ_v p_v z_v,   p = exp(z − lse)

    Class weights and label smoothing are out of scope; logp is per row, so a weight is a factor of it.

    Args:
        hidden: hidden states [*, H], any floating dtype. Rows whose target is ignored are not read.
        weight: LM head [V, H], same dtype and device as `hidden`.
        target: token ids [*], integers in [0, V) or `ignore_index`.
        bias: [V] or None. −inf masks a token out of the vocabulary, with a softcap too.
        temperature: > 0, divides the logits.
        softcap: > 0 or None, bounds the logits smoothly (Gemma 2).
        logit_scale: multiplies the logits before the softcap (Cohere; Granite's divisor is 1 / logit_scale).
        ignore_index: target value of rows that do not count.
        reduction: "sum" or "mean" over the rows that count (0 if none does). What every row's gradient is multiplied by
            is then known beforehand, so gradients are formed while the logits are there: 6·N·H·V flops for N rows. With
            "none", or where more is returned, a trainable head's logits are formed again in the backward, 8·N·H·V,
            unless all of them, N × V, fit `workspace_bytes`; those of a frozen head, 4·N·H·V, with return_lse only.
        return_lse: return lse [*] too, per row whatever the reduction, differentiable as logp is: the z-loss of other
            libraries is a factor times lse**2, summed or averaged over the rows that count.
        return_entropy: return the softmax's entropy [*] in nats too, without gradient.
        return_hit: return too whether no token has a larger z than the target, bool [*]: ties are hits, and the mean
            over the rows that count is the accuracy of the arg-max.
        grad_sampling: ε in [2⁻¹³, 1), or None for exact gradients. Log-probabilities, lse, entropy and hit stay exact;
            in the gradient p is replaced by q, a rounding of it at random without bias: entries p_v ≥ ε stay, others
            become 0 or ε by systematic sampling with one number u of a row, uniform in [0, 1) and drawn from torch's
            default generator of the device. With C_v = u + Σ p/ε over the small entries up to v,

                q_v = ε (⌊C_v⌋ − ⌊C_{v−1}⌋),   E[q] = p;   ∂logp/∂logit = (onehot(target) − q) · dz/dlogit

            A row has at most 1/ε + 2 entries, so the products of the backward become gathers and scatters: 2·N·H·V
            flops in all, whatever the reduction, the upstream gradient and what else is returned, beside N · (1/ε + 3)
            · 8 bytes that wait for the backward. What it adds to the noise of a batch is in docs/sampling.md.
        workspace_bytes: bound on the temporaries, logits above all, beside the gradients (weight's is summed in
            float32). None is, on CPUs, 1024 rows of float32 logits, as many as products need to be fast, but 64 to 512
            MiB, and 512 MiB where rows wait for their upstream gradients; on a GPU a 64th of its memory, at least 512
            MiB.
        backend: a name in `mopo_kernels.backends.BACKENDS`, or None for the table's choice.
        vocab_group: the processes that hold a part of the vocabulary each: `weight` [V_r, H] and `bias` [V_r] are then
            this one's rows of the head, in the order of ranks and as many as it has; targets stay those of the whole
            vocabulary. Statistics of rows are exchanged, never logits. Not needed where `weight` is a DTensor of
            Shard(0) or Replicate().
        rows: of a split head, "same" if every process has the same hidden states, as under tensor parallelism, or "own"
            if each has a batch of its own, as under FSDP: rows are then gathered, and the gradients of weight and bias
            are means over the processes, as FSDP's are. Every process calls, and runs the backward, as often as the
            others. Differing rows under "same" raise an error.

    Returns:
        logp [*], natural logarithm, float32 (float64 for float64 inputs), 0 where the target is ignored; or its sum or
        mean []. Where more is asked for, a tuple: logp, then lse, entropy and hit, those asked for, in this order; 0 or
        False where the target is ignored.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a target out of range; NaN hidden states or weights; a
            row that masks every token.
    """
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    call = HeadCall.of(
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
        average=reduction == "mean",
        outputs=Outputs(return_lse, return_entropy, return_hit),
        grad_sampling=grad_sampling,
    )
    inputs, call = enter(HeadInputs(hidden, weight, bias, token_ids(target)), call, backend, Split(vocab_group, rows))
    check_target(inputs.target, call.columns(inputs.weight), ignore_index)
    if reduction != "none" and call.fuses and not any(call.outputs):
        return run_total_logprob(inputs.flattened(), call)
    values = _rows(inputs, call)
    if reduction == "none":
        return _returned(values, call.outputs)
    total = values.logp.sum(dtype=torch.float64)
    total = total / (inputs.target != ignore_index).sum().clamp(min=1) if call.average else total
    return _returned(values._replace(logp=total.to(values.logp.dtype)), call.outputs)


def token_logprob(
    logits: Tensor,  # [*, V]
    target: Tensor,  # [*]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    return_hit: bool = False,
    overwrite_logits: bool = False,
    backend: str | None = None,
) -> Any:  # Tensor [*]; a tuple of it and what else is asked for
    """log softmax(logits) at the target token, per row; differentiable in `logits`.

    For models that hand out logits only; `linear_logprob` needs far less memory where the hidden states can be had.

    Args:
        logits: [*, V], any floating dtype; −inf masks a token. Rows whose target is ignored are not read. Leading
            dimensions that do not collapse, as those of logits[:, :-1], cost a copy: ignore the last position's target
            instead.
        target, temperature, softcap, ignore_index, return_lse, return_entropy, return_hit, backend: as in
            `linear_logprob`.
        overwrite_logits: let the backward write the gradient over the logits, which saves a second [*, V] tensor. For
            logits that nobody reads afterwards: an operator that saved them raises an error in its backward, as after
            any operation in place. Without effect on the reference backend and under torch.compile.

    Returns:
        logp [*], natural logarithm, float32 (float64 for float64 logits), 0 where the target is ignored; a tuple where
        more is asked for, as from `linear_logprob`.

    Raises:
        ValueError: shapes that do not fit; a target out of range; NaN logits; a row that masks every token.
    """
    target = token_ids(target)
    check_logits(logits, target)
    outputs = Outputs(return_lse, return_entropy, return_hit)
    call = HeadCall.of(temperature=temperature, softcap=softcap, ignore_index=ignore_index, outputs=outputs)
    call = call.on(backends.choose("token_logprob", logits.device.type, backend).backend)
    refuse_transforms("token_logprob", call.backend, logits, target)
    check_target(target, logits.shape[-1], ignore_index)
    flat, targets = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if call.backend == "reference":
        rows = reference.logits_rows(
            flat, targets, call.transform, ignore_index, entropy=return_entropy, hit=return_hit
        )
        check_result(rows.logp, logits=logits)
    else:
        rows = run_logits_logprob(flat, targets, call, overwrite_logits=overwrite_logits)
    return _returned(_shaped(rows, target), outputs)


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
    grad_sampling: float | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    vocab_group: dist.ProcessGroup | None = None,
    rows: RowsOf = "same",
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
    call = HeadCall.of(
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
        average=average,
        grad_sampling=grad_sampling,
    )
    inputs, call = enter(HeadInputs(hidden, weight, bias, token_ids(target)), call, backend, Split(vocab_group, rows))
    check_target(inputs.target, call.columns(inputs.weight), ignore_index)
    return sequence_totals(inputs, call)


def enter(inputs: HeadInputs, call: HeadCall, backend: str | None, split: Split) -> tuple[HeadInputs, HeadCall]:
    """A head's tensors, checked but for their values and cast as autocast has it, and the call with who runs it."""
    part = None
    if split.concerns(inputs.weight):
        inputs, part = take_part(inputs, split)
    check_head(inputs.hidden, inputs.weight, inputs.target, inputs.bias, is_split=part is not None)
    inputs = inputs.autocast()
    name = choose_backend(inputs, call, backend, is_split=part is not None)
    refuse_transforms("linear_logprob", name, *inputs, sampled=call.grad_sampling is not None)
    call = call.on(name, inputs.needs)
    return inputs, call if part is None else agree(inputs, call, split, part)


def sequence_totals(inputs: HeadInputs, call: HeadCall) -> Tensor:  # [B]
    """`sequence_logprob` of checked arguments."""
    logp = _rows(inputs, call).logp
    asked = backends.if_it_has("sequence_sums", call.backend)
    name = backends.choose("sequence_sums", logp.device.type, asked).backend
    if name == "reference":
        sums, counts = reference.sequence_sums(logp, inputs.target, call.ignore_index)
    else:
        sums, counts = ops.sequence_sums(logp, inputs.target, call.ignore_index, name)
    return (sums / counts.clamp(min=1) if call.average else sums).to(logp.dtype)


def _rows(inputs: HeadInputs, call: HeadCall) -> RowValues:  # [*] each
    """`linear_logprob` of checked arguments, without reduction."""
    flat, options = inputs.flattened(), (call.transform, call.ignore_index, call.workspace_bytes)
    if call.shard is not None and call.shard.own_rows:
        rows = run_own_rows(flat, call)
    elif call.grad_sampling is not None and any(call.needs):
        rows = run_sampled_logprob(flat, call)
    elif call.backend == "reference":
        rows = reference.head_rows(*flat, *options, entropy=call.outputs.entropy, hit=call.outputs.hit)
        check_result(rows.logp, hidden=flat.hidden, weight=flat.weight, bias=flat.bias)
    else:
        rows = run_head_logprob(flat, call)
    return _shaped(rows, inputs.target)


def _shaped(rows: RowValues, target: Tensor) -> RowValues:
    """As the target; what nobody asked for has no rows."""
    return RowValues(*(x.reshape(target.shape) if x.numel() == target.numel() else x for x in rows))


def _returned(rows: RowValues, outputs: Outputs) -> Any:
    """logp, or a tuple of it and what is asked for; lse comes in float64 from the engines."""
    if not any(outputs):
        return rows.logp
    values = rows.lse.to(rows.logp.dtype), rows.entropy, rows.hit
    return rows.logp, *(x for x, asked in zip(values, outputs, strict=True) if asked)
