"""Every rank's part of a step's groups: dealt out evenly, none twice, and none at all where there are too few.

Accelerate's own way repeats the first groups until all ranks have as many, which counts them twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader


class DealtBatches:
    """The batches of one rank: as many as those of the others, empty where a step has fewer groups than ranks."""

    batch_size = None  # it varies

    def __init__(self, batches: BatchSampler, rank: int, ranks: int, *, a_step: int) -> None:
        self.batches, self.rank, self.ranks = batches, rank, ranks
        self.a_step = a_step  # batches that all ranks together take a step
        self.sampler = batches.sampler  # where accelerate sets the epoch
        self.drop_last = batches.drop_last

    def __len__(self) -> int:
        count = len(self.batches)
        return count // self.a_step if self.drop_last else -(-count // self.a_step)

    def __iter__(self) -> Iterator[Sequence[int]]:
        batches = iter(self.batches)
        while step := list(islice(batches, self.a_step)):
            if self.drop_last and len(step) < self.a_step:
                return
            groups = [group for batch in step for group in batch]
            yield groups[len(groups) * self.rank // self.ranks : len(groups) * (self.rank + 1) // self.ranks]


def deal(loader: DataLoader, rank: int, ranks: int) -> DataLoader:
    """A loader that accelerate has prepared for several processes, with our way of dealing in place of its own."""
    shard: Any = loader.batch_sampler
    a_step = 1 if shard.split_batches else ranks
    shard.batch_sampler = DealtBatches(shard.batch_sampler, rank, ranks, a_step=a_step)
    shard.num_processes, shard.process_index, shard.batch_size = 1, 0, None
    shard.even_batches = shard.split_batches = False
    return loader
