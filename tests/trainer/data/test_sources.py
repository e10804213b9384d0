import gzip
import json

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from mopo_trainer.data.sources import DataError, load_rows

ROWS = [
    {"prompt": "Why?", "responses": ["Because.", "No."], "ratings": {"zeal": [5, 4.67], "care": [1, 2]}},
    {"prompt": "How?", "responses": ["So.", "Thus."], "comparisons": {"care": [[0, 1, 0.5]]}, "note": "ü"},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def check_rows(loaded):
    """Both rows, absent columns null, objectives in the order of the file."""
    assert loaded[0]["ratings"] == ROWS[0]["ratings"]
    assert list(loaded.features["ratings"]) == ["zeal", "care"]
    assert loaded[0]["comparisons"] is None
    assert loaded[1]["comparisons"] == {"care": [[0.0, 1.0, 0.5]]}
    assert loaded[1]["ratings"] is None
    assert loaded["note"] == [None, "ü"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_json_lines(tmp_path, name):
    check_rows(load_rows(write(tmp_path / name, lines(ROWS))))


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_json_list(tmp_path, name):
    check_rows(load_rows(write(tmp_path / name, json.dumps(ROWS, indent=2).encode())))


def test_blank_lines_are_skipped(tmp_path):
    assert len(load_rows(write(tmp_path / "rows.jsonl", lines(ROWS[:1]) + b"\n  \n" + lines(ROWS[1:])))) == 2


def test_parquet(tmp_path):
    Dataset.from_list([{**row, "note": "", "ratings": None} for row in ROWS]).to_parquet(tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet")["prompt"] == ["Why?", "How?"]


def test_directory_of_a_dataset(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")["prompt"] == ["Why?", "How?"]


def test_directory_of_splits(tmp_path):
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[1:])).save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved")["prompt"] == ["Why?", "How?"]
    assert load_rows(tmp_path / "saved", split="test")["prompt"] == ["How?"]
    with pytest.raises(DataError, match=r"saved: no split 'valid'; it has: train, test"):
        load_rows(tmp_path / "saved", split="valid")


def test_hub_name(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or Dataset.from_list(ROWS))
    assert len(load_rows("someone/some-data", split="test", name="english")) == 2
    assert calls == [(("someone/some-data",), {"name": "english", "split": "test"})]


def test_hub_name_offline_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"^someone/some-data: .* nor a dataset that the hub would give .*path of a file$"
    ):
        load_rows("someone/some-data")


def test_a_column_that_mixes_types_is_left_out_unless_it_is_read(tmp_path, caplog):
    loaded = load_rows(write(tmp_path / "a.jsonl", lines([{"prompt": "a", "note": 1}, {"prompt": "b", "note": "x"}])))
    assert loaded.column_names == ["prompt"]
    assert "column `note` mixes types" in caplog.text
    with pytest.raises(DataError, match=r"b\.jsonl: column `prompt` mixes types .*same way in every row"):
        load_rows(write(tmp_path / "b.jsonl", lines([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}])))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl", lines(ROWS)[:-9], r"cut\.jsonl, line 2: not valid JSON .*cut short or damaged"),
        ("cut.jsonl.gz", lines(ROWS)[:-9], r"cut\.jsonl\.gz, line 2: not valid JSON"),
        ("cut.json", json.dumps(ROWS).encode()[:-9], r"cut\.json: not valid JSON"),
        ("latin.jsonl", lines(ROWS[:1]) + b'{"prompt": "\xfc"}\n', r"latin\.jsonl, line 2: not valid JSON .*utf-8"),
        ("list.jsonl", lines(ROWS) + b"[1, 2]\n", r"list\.jsonl, line 3: got '\[1, 2\]'; write one JSON object"),
        ("list.json", b'[{"prompt": "a"}, 7]', r"list\.json, element 1: got '7'"),
        ("twice.jsonl", b'{"ratings": {"a": [1], "a": [2]}}\n', r"line 1: .*'a' stands twice in one object"),
        ("empty.jsonl", b"", r"empty\.jsonl: the dataset is empty"),
        ("blank.json", b"\n\n", r"blank\.json: the dataset is empty"),
        ("rows.parquet", b"not a table", r"rows\.parquet: not a readable Parquet file"),
        ("rows.csv", b"a,b\n", r"rows\.csv: unknown kind of file; give one of \.jsonl"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_gzip_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(ROWS))[:-12])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: the gzip file is cut short"):
        load_rows(path)


def test_directory_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match="not a directory that `save_to_disk` wrote") as caught:
        load_rows(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "no/such/directory", "/nowhere"])
def test_missing_file(source):
    with pytest.raises(DataError, match=f"^{source}: no such file or directory$"):
        load_rows(source)
