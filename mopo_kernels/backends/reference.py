"""Reference backend: plain torch, any device and dtype. It is the truth that every other backend is held to.

    z = (hidden weightᵀ + bias) · logit_scale                   [N, V]
    z = softcap · tanh(z / softcap)                             where softcap is given
    z = z / temperature
    logp_n = z_n[target_n] − log Σ_v exp z_nv                   0 where target is ignore_index

Without `workspace_bytes` the logits of all counted rows are materialised; with it, rows are taken in blocks whose
logits fit, and the backward recomputes each block.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

UNAVAILABLE = ""
FILTER_BLOCK = 128  # rows and columns of a block that grad_filter may skip


def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    grad_filter: float | None,
    workspace_bytes: int | None,
) -> Tensor:  # [N]
    rows = (target != ignore_index).nonzero().squeeze(-1)
    block = partial(
        _block_logprob, temperature=temperature, softcap=softcap, logit_scale=logit_scale, grad_filter=grad_filter
    )
    if workspace_bytes is None:
        logp = block(hidden[rows], weight, bias, target[rows])
    else:
        rows_per_block = max(1, workspace_bytes // (weight.shape[0] * max(4, weight.element_size())))
        logp = torch.cat(
            [
                checkpoint(block, hidden[part], weight, bias, target[part], use_reentrant=False)
                for part in rows.split(rows_per_block)
            ]
        )
    return logp.new_zeros(target.shape).index_copy(0, rows, logp)


def token_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    *,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> Tensor:  # [N]
    rows = (target != ignore_index).nonzero().squeeze(-1)
    logp = _gather_logprob(logits[rows], target[rows], temperature, softcap, grad_filter=None)
    return logp.new_zeros(target.shape).index_copy(0, rows, logp)


def sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B] float64, [B] int64
    counts = target != ignore_index
    return torch.where(counts, logp, 0).sum(-1, dtype=torch.float64), counts.sum(-1)


def _block_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    grad_filter: float | None,
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return _gather_logprob(logits, target, temperature, softcap, grad_filter)


def _gather_logprob(
    logits: Tensor, target: Tensor, temperature: float, softcap: float | None, grad_filter: float | None
) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature != 1.0:
        z = z / temperature
    z_target = z.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if grad_filter is not None and z.requires_grad:
        z = _skip_small_blocks(z, grad_filter)
    return z_target - z.logsumexp(-1)


def _skip_small_blocks(z: Tensor, grad_filter: float) -> Tensor:
    """z itself, whose gradient −softmax is dropped in blocks where every softmax is below `grad_filter`."""
    with torch.no_grad():
        rows, columns = (-size % FILTER_BLOCK for size in z.shape)
        p = torch.nn.functional.pad(z.softmax(-1), (0, columns, 0, rows))
        p = p.unflatten(1, (-1, FILTER_BLOCK)).unflatten(0, (-1, FILTER_BLOCK))
        keep = p.amax(dim=(1, 3)) >= grad_filter

    def mask(grad: Tensor) -> Tensor:
        kept = keep.repeat_interleave(FILTER_BLOCK, 0).repeat_interleave(FILTER_BLOCK, 1)
        return grad * kept[: grad.shape[0], : grad.shape[1]]

    z = z.view_as(z)
    z.register_hook(mask)
    return z
