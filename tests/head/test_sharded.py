"""Statistics of parts of a vocabulary, merged, are those of the whole; a part's targets are its own columns."""

import pytest
import torch

from mopo_kernels.backends import reference
from mopo_kernels.backends.fold import Statistics, Tile, Transform
from mopo_kernels.head.shard import Shard
from mopo_kernels.head.sharded import merged

PARTS = {"uneven": (5, 11, 1), "one": (17,), "none in the middle": (9, 0, 8), "masked at the end": (12, 5)}


def statistics_of(logits, target, first):
    found = Statistics.start(len(target), target.device, entropy=True)
    if logits.shape[1]:
        reference.fold_statistics(Tile(logits, target, Transform.of(1.0), first), found)
    return found


@pytest.mark.parametrize("name", PARTS)
def test_merged_statistics_are_those_of_the_whole(name):
    logits = 30 * torch.randn(6, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = logits[2, 12:] = -torch.inf
    if name == "masked at the end":
        logits[:, 12:] = -torch.inf
    target = torch.tensor([0, 4, 5, 11, 9, 8])
    whole = statistics_of(logits, target, 0)
    parts, first = [], 0
    for size in PARTS[name]:
        parts.append(torch.stack(list(statistics_of(logits[:, first : first + size], target, first))))
        first += size
    found = merged(torch.stack(parts))
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert a.is_contiguous()


def test_merging_does_not_hide_nan():
    parts = torch.tensor([[[0.0], [1.0], [0.0]], [[torch.nan], [torch.nan], [-torch.inf]]], dtype=torch.float64)
    assert merged(parts).logp.isnan().all()


def test_targets_elsewhere_are_one_past_the_last_column():
    shard = Shard(group=0, first=4, vocab=10, largest=4, own_rows=False)
    assert shard.local(torch.tensor([3, 4, 6, 7, 9, -100]), 3).tolist() == [3, 0, 2, 3, 3, 3]
