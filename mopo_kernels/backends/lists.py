"""Sampled entries as lists of rows to be summed: the products of the backward, for kernels that know one operation,

    out[i] ← Σ_e value[e] · source[source_row[e]],   start[i] ≤ e < stop[i]

whose source is the weight (a list for each row of hidden) or hidden (a list for each token of the vocabulary, its rows
in their order). No result is added to twice, so the sums have one order, on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels.backends.fold import Samples


class Lists(NamedTuple):
    """All contiguous."""

    start: Tensor  # [I] int64
    stop: Tensor  # [I] int64
    source_row: Tensor  # [E] int32
    value: Tensor  # [E] float32, or float64


def lists_of_rows(samples: Samples) -> Lists:
    """For each row the tokens that it has entries for: they lie so already."""
    rows, capacity = samples.columns.shape
    start = torch.arange(rows, device=samples.columns.device) * capacity
    return Lists(start, start + samples.counts, samples.columns.view(-1), samples.values.view(-1))


def lists_of_columns(samples: Samples, vocab: int) -> Lists:
    """For each token the rows that have an entry for it."""
    capacity, device = samples.columns.shape[1], samples.columns.device
    is_entry = torch.arange(capacity, device=device) < samples.counts[:, None]
    place = is_entry.view(-1).nonzero().squeeze(1)
    columns, order = samples.columns.view(-1)[place].sort(stable=True)
    place = place[order]
    edges = torch.searchsorted(columns, torch.arange(vocab + 1, dtype=torch.int32, device=device))
    return Lists(edges[:-1], edges[1:], (place // capacity).int(), samples.values.view(-1)[place])
