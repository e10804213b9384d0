"""Which rows count, and the blocks that they are dealt to."""

import pytest
import torch

from mopo_kernels.head.rows import count, put, rows_that_count, split, take, whole_groups


def test_rows_that_count():
    assert rows_that_count(torch.arange(5), -100) == slice(0, 5)
    assert rows_that_count(torch.tensor([1, -100, 2]), -100).tolist() == [0, 2]
    assert rows_that_count(torch.tensor([3, 3]), 3).tolist() == []


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_blocks_are_all_rows_in_order(size):
    as_slices, as_rows = split(slice(2, 9), size), split(torch.arange(2, 9), size)
    assert [list(range(9))[x] for x in as_slices] == [x.tolist() for x in as_rows]
    assert torch.cat(list(as_rows)).tolist() == list(range(2, 9))
    assert [count(x) for x in as_slices] == [count(x) for x in as_rows]
    assert max(map(count, as_slices)) == min(size, 7)
    assert list(split(slice(0, 0), size)) == list(split(torch.arange(0), size)) == []


def test_groups_stay_whole():
    rows, slot = torch.tensor([10, 11, 12, 13, 14, 15, 16]), torch.tensor([2, 0, 2, 1, 0, 2, 4])
    dealt = [[sorted(x.tolist()) for x in whole_groups(rows, slot, row_block)] for row_block in (1, 3, 4, 7)]
    alone = [[11, 14], [13], [10, 12, 15], [16]]
    assert dealt[0] == alone
    assert dealt[1] == [[11, 13, 14], [10, 12, 15], [16]]
    assert dealt[2] == [[11, 13, 14], [10, 12, 15, 16]]
    assert dealt[3] == [sorted(rows.tolist())]
    assert whole_groups(rows[:0], slot[:0], 3) == ()


def test_rows_are_taken_and_put_back():
    hidden = torch.arange(12.0).view(4, 3)
    picked, part = torch.tensor([3, 0]), slice(1, 3)
    assert take(hidden, part, torch.float32).data_ptr() == hidden[1:].data_ptr()
    assert torch.equal(take(hidden, picked, torch.float64), hidden[[3, 0]].double())
    total = torch.zeros(4, 3, dtype=torch.bfloat16)
    put(total, picked, torch.ones(2, 3))
    put(total, part, torch.full((2, 3), 2.0))
    assert total[:, 0].tolist() == [1, 2, 2, 1]
    put(total, part, total[part])  # formed there already
    assert total[:, 0].tolist() == [1, 2, 2, 1]
