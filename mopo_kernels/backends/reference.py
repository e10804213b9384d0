"""Reference backend: plain torch, any device and dtype. It is the truth that every other backend is held to.

    z = inner · (hidden weightᵀ + bias)                         [N, V]
    z = outer · tanh(z)                                         where a softcap is given and z is finite
    logp_n = z_n[target_n] − log Σ_v exp z_nv                   0 where target is ignore_index

Without `workspace_bytes` the logits of all counted rows are materialised; with it, rows are taken in blocks whose
logits fit, and the backward recomputes each block. The truth of `label_statistics` stands in objective/target.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mopo_kernels.backends.fold import Transform

UNAVAILABLE = ""


def head_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    transform: Transform,
    ignore_index: int,
    workspace_bytes: int | None,
) -> Tensor:  # [N]
    rows = (target != ignore_index).nonzero().squeeze(-1)
    if workspace_bytes is None:
        logp = _block_logprob(hidden[rows], weight, bias, target[rows], transform)
    else:
        rows_per_block = max(1, workspace_bytes // (weight.shape[0] * max(4, weight.element_size())))
        parts = [
            checkpoint(_block_logprob, hidden[part], weight, bias, target[part], transform, use_reentrant=False)
            for part in rows.split(rows_per_block)
        ]
        logp = torch.cat(parts)
    return logp.new_zeros(target.shape).index_copy(0, rows, logp)


def logits_logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    transform: Transform,
    ignore_index: int,
) -> Tensor:  # [N]
    rows = (target != ignore_index).nonzero().squeeze(-1)
    logp = _gather_logprob(logits[rows], target[rows], transform)
    return logp.new_zeros(target.shape).index_copy(0, rows, logp)


def sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B] float64, [B] int64
    counts = target != ignore_index
    return torch.where(counts, logp, 0).sum(-1, dtype=torch.float64), counts.sum(-1)


def _block_logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform) -> Tensor:
    return _gather_logprob(torch.nn.functional.linear(hidden, weight, bias), target, transform)


def _gather_logprob(logits: Tensor, target: Tensor, transform: Transform) -> Tensor:
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * transform.inner
    if transform.softcap:
        z = torch.where(z.isinf(), z.detach(), torch.tanh(z) * transform.outer)
    lse = z.logsumexp(-1)
    lse = lse.masked_fill(lse == math.inf, math.nan)  # a logit of +∞ must show, at other targets too
    return z.gather(-1, target.unsqueeze(-1)).squeeze(-1) - lse
