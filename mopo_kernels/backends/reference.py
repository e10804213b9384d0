"""Reference backend: plain torch, any device and dtype. It is the truth that every other backend is held to.

    z = inner · (hidden weightᵀ + bias)                         [N, V]
    z = outer · tanh(z)                                         where a softcap is given and z is finite
    lse_n = log Σ_v exp z_nv,   logp_n = z_n[target_n] − lse_n    0 where target is ignore_index

Without `workspace_bytes` the logits of all counted rows are materialised; with it, rows are taken in blocks whose
logits fit, and the backward recomputes each block. The truth of `label_statistics` stands in objective/target.py.

Sampled gradients have no plain graph: for them the fold contract stands here as well, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mopo_kernels.backends import transforms
from mopo_kernels.backends.fold import GRID, Samples, Statistics, Tile, Transform

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


# ------------------------------------------------------------------------------------------------------ fold contract


def fold_statistics(tile: Tile, statistics: Statistics) -> None:
    where = (tile.target >= 0).nonzero().squeeze(-1)
    z, _ = _folded(tile, where)
    maximum = z.amax(1).clamp(min=statistics.maximum[where])
    maximum = maximum.where(~z.isnan().any(1), math.nan)
    shift = maximum.where(maximum > -math.inf, 0)
    before = statistics.maximum[where] - shift
    below = z - shift[:, None]
    shrunk, exponential = before.exp(), below.exp()
    if statistics.weighted is not None:
        moved = (statistics.weighted[where] + statistics.total[where] * before.nan_to_num(neginf=0)) * shrunk
        terms = torch.where(exponential > 0, exponential * below, 0)
        statistics.weighted[where] = moved + terms.sum(1)
    statistics.total[where] = statistics.total[where] * shrunk + exponential.sum(1)
    statistics.maximum[where] = maximum
    target = tile.target[where] - tile.first_column
    inside = (target >= 0) & (target < z.shape[1])
    statistics.chosen[where[inside]] = z[inside, target[inside]]


def fold_gradient(
    tile: Tile, lse: Tensor, coefficient: Tensor, out: Tensor, lse_coefficient: Tensor | None = None
) -> None:
    of_lse = torch.zeros_like(coefficient) if lse_coefficient is None else lse_coefficient
    where = ((coefficient != 0) | (of_lse != 0)).nonzero().squeeze(-1)
    z, slope = _folded(tile, where)
    p = (z - lse[where, None]).exp()
    onehot = (torch.arange(z.shape[1], device=z.device) == tile.target[where, None] - tile.first_column).double()
    gradient = (coefficient[where, None] * (onehot - p) + of_lse[where, None] * p) * slope
    out.zero_().index_copy_(0, where, gradient.to(out.dtype))


def fold_sample(tile: Tile, lse: Tensor, running: Tensor, floor: float, samples: Samples) -> None:
    where = (tile.target >= 0).nonzero().squeeze(-1)
    z, slope = _folded(tile, where)
    p = (z - lse[where, None]).exp()
    q, running[where] = rounded_at_random(p, running[where], floor)
    target = tile.target[where, None] - tile.first_column
    is_entry = (q > 0) | (torch.arange(z.shape[1], device=z.device) == target)
    row, column = is_entry.nonzero().unbind(1)
    place = samples.counts[where][row] + (is_entry.cumsum(1) - 1)[row, column]
    fits = place < samples.columns.shape[1]
    row, column, place = row[fits], column[fits], place[fits]
    samples.columns[where[row], place] = (column + tile.first_column).int()
    samples.values[where[row], place] = (q * slope)[row, column].to(samples.values.dtype)
    total = samples.counts[where] + is_entry.sum(1)
    samples.counts[where] = total.clamp(max=samples.columns.shape[1]).int()


def rounded_at_random(p: Tensor, running: Tensor, floor: float) -> tuple[Tensor, Tensor]:  # [R, C], [R]
    """q of the contract and the running sum after these columns, all float64."""
    small = torch.where(p >= floor, 0, p * (1 / floor))
    after = running[:, None] + (small / GRID).round().mul(GRID).cumsum(1)
    steps = torch.diff(after.floor(), prepend=running.floor()[:, None])
    return torch.where(p >= floor, p, floor * steps), after[:, -1]


def sample_hidden(samples: Samples, weight: Tensor, out: Tensor) -> None:
    columns, values = samples.columns.clamp(min=0).long(), samples.values.double()
    for row, (column, value) in enumerate(zip(columns, values, strict=True)):
        out[row] = value @ weight[column].double()


def sample_weight(samples: Samples, hidden: Tensor, out: Tensor) -> None:
    row, place = (samples.columns >= 0).nonzero().unbind(1)
    total = torch.zeros_like(out, dtype=torch.float64)
    terms = samples.values[row, place].double()[:, None] * hidden[row].double()
    out.copy_(total.index_add_(0, samples.columns[row, place].long(), terms))


def _folded(tile: Tile, where: Tensor) -> tuple[Tensor, Tensor]:
    """z and dz/dlogit of some rows, float64."""
    logits, (inner, outer, softcap) = tile.logits[where].double(), tile.transform
    u = inner * (logits if tile.bias is None else logits + tile.bias.double())
    if not softcap:
        return u, torch.full_like(u, inner)
    return torch.where(u.isinf(), u, outer * u.tanh()), inner * outer * (1 - u.tanh() ** 2)
