"""Reference backend: plain torch, any device and dtype. It is the truth that every other backend is held to.

    z = inner · (hidden weightᵀ + bias)                         [N, V]
    z = outer · tanh(z)                                         where a softcap is given and z is finite
    lse_n = log Σ_v exp z_nv,   logp_n = z_n[target_n] − lse_n    0 where target is ignore_index

Without `workspace_bytes` the logits of all counted rows are materialised; with it, rows are taken in blocks whose
logits fit, and the backward recomputes each block. The truth of `label_statistics` stands in objective/target.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mopo_kernels.backends import transforms
from mopo_kernels.backends.fold import Transform

UNAVAILABLE = ""


class RowValues(NamedTuple):
    """What is said of rows, 0 where target is ignore_index; entropy and hit carry no gradient."""

    logp: Tensor  # [N]
    lse: Tensor  # [N]
    entropy: Tensor  # [N] nats, or [0] where nobody asks
    hit: Tensor  # [N] bool, or [0]: no token's z is above the target's


def head_rows(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [N]
    transform: Transform,
    ignore_index: int,
    workspace_bytes: int | None,
    **asked: bool,  # entropy, hit
) -> RowValues:
    def block(hidden: Tensor, target: Tensor) -> RowValues:
        return _block_rows(torch.nn.functional.linear(hidden, weight, bias), target, transform, **asked)

    if workspace_bytes is None or transforms.is_active():  # torch.func knows no checkpoints
        return _counted_rows(block, hidden, target, ignore_index)
    rows_per_block = max(1, workspace_bytes // (weight.shape[0] * max(4, weight.element_size())))

    def blocks(hidden: Tensor, target: Tensor) -> RowValues:
        parts = zip(hidden.split(rows_per_block), target.split(rows_per_block), strict=True)
        results = [checkpoint(block, *part, use_reentrant=False) for part in parts]
        return RowValues(*map(torch.cat, zip(*results, strict=True)))

    return _counted_rows(blocks, hidden, target, ignore_index)


def logits_rows(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N]
    transform: Transform,
    ignore_index: int,
    **asked: bool,  # entropy, hit
) -> RowValues:
    return _counted_rows(lambda x, y: _block_rows(x, y, transform, **asked), logits, target, ignore_index)


def sequence_sums(
    logp: Tensor,  # [B, L]
    target: Tensor,  # [B, L]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [B] float64, [B] int64
    counts = target != ignore_index
    return torch.where(counts, logp, 0).sum(-1, dtype=torch.float64), counts.sum(-1)


def _counted_rows(
    compute: Callable[[Tensor, Tensor], RowValues], x: Tensor, target: Tensor, ignore_index: int
) -> RowValues:
    """compute(x, target) of the rows that count, 0 elsewhere."""
    where = (target != ignore_index).nonzero().squeeze(-1)
    values = compute(x[where], target[where])
    return RowValues(*(x if len(x) < len(where) else x.new_zeros(target.shape).index_copy(0, where, x) for x in values))


def _block_rows(
    logits: Tensor, target: Tensor, transform: Transform, *, entropy: bool = False, hit: bool = False
) -> RowValues:
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * transform.inner
    if transform.softcap:
        z = torch.where(z.isinf(), z.detach(), torch.tanh(z) * transform.outer)
    lse = z.logsumexp(-1)
    lse = lse.masked_fill(lse == math.inf, math.nan)  # a logit of +∞ must show, at other targets too
    chosen = z.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        nats = torch.special.entr(z.softmax(-1)).sum(-1) if entropy else lse.new_empty(0)
        is_hit = chosen >= z.amax(-1) if hit else lse.new_empty(0, dtype=torch.bool)
    return RowValues(chosen - lse, lse, nats, is_hit)
