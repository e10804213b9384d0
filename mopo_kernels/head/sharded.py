"""An engine over one process's part of the vocabulary: what it lacks of the others' is one exchange a block of rows.

statistics   (maximum, total, chosen[, weighted]) of every process are gathered and merged: 24 bytes a row and
             process, 32 with entropies
sample       the mass below the floor of every process is gathered: 8 bytes a row and process
finish       grad_hidden of the rows that count is summed over the processes, 4·H bytes a row (8·H for float64);
             the gradients of weight and bias are the process's own
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mopo_kernels.backends.fold import Samples, Statistics
from mopo_kernels.head.call import Gradients, HeadInputs
from mopo_kernels.head.rows import Rows, put, take
from mopo_kernels.head.shard import Shard, add_up, gather, group_of
from mopo_kernels.head.tiles import TileEngine


class ShardedEngine:
    """A tile engine whose statistics and gradients of hidden states are those of the whole vocabulary."""

    def __init__(self, engine: TileEngine, shard: Shard, counted: Rows) -> None:
        self.engine, self.group, self.counted = engine, group_of(shard.group), counted
        self.row_block = engine.row_block

    def statistics(self, rows: Rows) -> Statistics:
        return merged(gather(torch.stack([x for x in self.engine.statistics(rows) if x is not None]), self.group))

    def add(self, rows: Rows, lse: Tensor, coefficient: Tensor, lse_coefficient: Tensor | None = None) -> None:
        self.engine.add(rows, lse, coefficient, lse_coefficient)

    def sample(self, rows: Rows, lse: Tensor, running: Tensor, samples: Samples) -> None:
        """Twice: what these columns add to the running sum, exactly, and then from where the earlier ones leave it."""
        own = running.clone()
        self.engine.sample(rows, lse, own, Samples(*(x.clone() for x in samples)))
        earlier = gather(own - running, self.group)[: dist.get_rank(self.group)]
        self.engine.sample(rows, lse, running + earlier.sum(0), samples)

    def finish(self) -> Gradients:
        grad_hidden, *others = self.engine.finish()
        if grad_hidden is not None:
            total = add_up(take(grad_hidden, self.counted, grad_hidden.dtype).contiguous(), self.group)
            put(grad_hidden, self.counted, total)
            grad_hidden = grad_hidden.to(self.engine.inputs.hidden.dtype)
        return grad_hidden, others[0], others[1]


def of_shard(inputs: HeadInputs, shard: Shard) -> HeadInputs:
    """The inputs as an engine over the shard's columns takes them."""
    return inputs._replace(target=shard.local(inputs.target, inputs.weight.shape[0]))


def merged(parts: Tensor) -> Statistics:  # [W, 3 or 4, R]
    """The statistics of all columns from those of every process."""
    maximum, total, chosen, *weighted = parts.unbind(1)
    highest = maximum.amax(0)
    shift = torch.where(maximum == -math.inf, 0, maximum - highest)  # a process without a column that is not masked
    scale = torch.where(maximum == -math.inf, 0, shift.exp())
    both = (scale * (part + total * shift) for part in weighted)
    return Statistics(highest, (scale * total).sum(0), chosen.amax(0), *(x.sum(0) for x in both))
