"""Groups are dealt to ranks evenly, none twice; a loader that accelerate has prepared deals them so."""

from itertools import chain

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mopo_trainer.data.packing import collate
from mopo_trainer.training.batches import DealtBatches, deal


def dealt(groups, size, ranks, *, drop_last=False):
    batches = BatchSampler(SequentialSampler(range(groups)), size, drop_last)
    return [list(DealtBatches(batches, rank, ranks, a_step=ranks)) for rank in range(ranks)]


@pytest.mark.parametrize("groups", [1, 5, 8, 9, 11, 16, 17])
@pytest.mark.parametrize(("size", "ranks"), [(4, 2), (2, 4), (1, 3), (3, 1)])
def test_every_group_is_dealt_once_in_the_steps_of_one_process(groups, size, ranks):
    parts = dealt(groups, size, ranks)
    whole = list(BatchSampler(SequentialSampler(range(groups)), size * ranks, False))
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole
    for step in zip(*parts, strict=True):
        assert max(map(len, step)) - min(map(len, step)) <= 1


def test_incomplete_steps_are_dropped_where_asked():
    assert dealt(13, 2, 2, drop_last=True) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]
    assert dealt(15, 2, 2, drop_last=True) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


@pytest.mark.parametrize("split", [False, True])
def test_a_prepared_loader_deals_so(split):
    rows = [{"input_ids": [[i, 7], [i, 8]], "prompt_tokens": [1, 1], "first_response": 2 * i} for i in range(9)]
    found = []
    for rank in range(2):
        loader = DataLoader(rows, batch_size=8 if split else 4, collate_fn=collate)
        options = {"num_processes": 2, "process_index": rank, "put_on_device": False, "split_batches": split}
        loader = deal(prepare_data_loader(loader, **options), rank, 2)
        assert len(loader) == 2
        found.append([(b["batch"].groups, b["batch"].response.tolist()) for b in loader])
        assert [b["batch"].groups for b in skip_first_batches(loader, 1)] == [found[-1][1][0]]
    assert found == [
        [(4, list(range(8))), (0, [])],
        [(4, list(range(8, 16))), (1, [16, 17])],
    ]
