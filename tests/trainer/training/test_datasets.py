"""Every container of the same rows is the same data set; what is none is named."""

import json
import math

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream

from mopo_trainer.data.sources import DataError
from mopo_trainer.training import datasets as reading
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.datasets import read_groups, read_rows


class MapStyle(TorchDataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]  # never raises IndexError, as many do not


class Stream(TorchStream):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "Dataset": Dataset.from_list,
    "stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "stream of a generator": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "generator": lambda rows: (row for row in rows),
    "DataFrame": pd.DataFrame,
    "filtered DataFrame": lambda rows: pd.DataFrame([*rows, *rows])[len(rows) :],  # its index does not begin at 0
    "table": pa.Table.from_pylist,
    "torch map": MapStyle,
    "torch stream": Stream,
    "DatasetDict": lambda rows: DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])),
    "dict": lambda rows: {"train": rows, "test": rows[:1]},
    "streams by split": lambda rows: IterableDatasetDict(train=Dataset.from_list(rows).to_iterable_dataset()),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_groups(container, pairs):
    args = MOPOConfig(use_cpu=True)
    found = read_groups(CONTAINERS[container](pairs), "train_dataset", args)
    assert found.to_list() == read_groups(pairs, "train_dataset", args).to_list()


def test_a_data_frame_s_nan_is_an_unlabelled_pair(pairs):
    frame = pd.DataFrame(pairs)
    frame.loc[0, "preference"] = float("nan")
    args = MOPOConfig(use_cpu=True)
    without = [{**pairs[0], "preference": None}, *pairs[1:]]
    found = read_groups(frame, "train_dataset", args)
    assert found.to_list() == read_groups(without, "train_dataset", args).to_list()


def test_paths_and_directories(tmp_path, pairs):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    DatasetDict(train=Dataset.from_list(pairs), test=Dataset.from_list(pairs[:3])).save_to_disk(tmp_path / "both")
    datasets.disable_progress_bars()
    for source in (file, str(file)):
        assert len(read_rows(source, "train_dataset")) == 8
    assert len(read_rows(str(tmp_path / "both"), "train_dataset")) == 8
    assert len(read_rows(tmp_path / "both", "eval_dataset", split="test")) == 3


def test_an_endless_stream_is_refused(pairs, monkeypatch):
    def forever():
        while True:
            yield pairs[0]

    monkeypatch.setattr(reading, "MOST_STREAMED", 50)
    for stream in (forever(), IterableDataset.from_generator(forever)):
        with pytest.raises(DataError, match=r"train_dataset streams more than 50 rows .* \.take\(n\)"):
            read_rows(stream, "train_dataset")
    assert len(read_rows(iter(pairs * 6), "train_dataset")) == 48


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"validation": [], "test": []}, r"train_dataset is a dict of 'validation', 'test' without 'train'"),
        ({"prompt": ["a"], "chosen": ["b"]}, "train_dataset is a dict of 'prompt', 'chosen' without 'train'"),
        ({"train": 3}, r"train_dataset\['train'\] is a int; give rows"),
        (None, "train_dataset is a NoneType; give rows"),
        (lambda: iter([]), "train_dataset is a function; give rows"),
        (["a row"], "train_dataset, row 0 is a str; give one mapping per row"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_what_is_no_data_set_is_named(source, message):
    with pytest.raises(DataError, match=message):
        read_rows(source, "train_dataset")


def test_bad_rows_of_a_path_and_of_rows_are_skipped_on_request(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(pair)}\n{{\n{json.dumps({**pair, 'chosen': ''})}\n")
    skip = MOPOConfig(output_dir=str(tmp_path), on_bad_row="skip", use_cpu=True)
    assert len(read_groups(path, "train_dataset", skip)) == 1
    frame = pd.DataFrame([pair, {**pair, "chosen": math.nan}, {**pair, "preference": {"x": 1}}])
    assert len(read_groups(frame, "train_dataset", skip)) == 2
