"""A vocabulary split over processes: which columns of the logits are whose, and how the processes add up.

Every process of a group holds some rows of the LM head, in the order of their ranks: any number each, none too. Logits
never travel, but statistics of rows and sums of gradients do, by the two functions here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_GROUPS: list[dist.ProcessGroup] = []


class Shard(NamedTuple):
    """A process's part of a vocabulary, in numbers that an operator takes."""

    group: int  # see number_of
    first: int  # column of the whole vocabulary
    vocab: int  # columns that there are
    largest: int  # columns that any process holds: what all plan for, so that they meet at the same blocks of rows
    own_rows: bool  # every process has its own rows, which are gathered; else all have the same

    def local(self, target: Tensor, columns: int) -> Tensor:
        """Targets as columns of this process; one past its last stands for those of the others."""
        here = (target >= self.first) & (target < self.first + columns)
        return torch.where(here, target - self.first, columns)


def number_of(group: dist.ProcessGroup) -> int:
    """A number for a process group, which operators do not take: the same for as long as this process lives."""
    places = [i for i, other in enumerate(_GROUPS) if other is group]
    if not places:
        _GROUPS.append(group)
    return places[0] if places else len(_GROUPS) - 1


def group_of(number: int) -> dist.ProcessGroup:
    return _GROUPS[number]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:  # [W, *x.shape]
    """x of every process, in the order of their ranks: the same bits everywhere."""
    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=group)
    return parts


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x ← its sum over the processes."""
    dist.all_reduce(x, group=group)
    return x
