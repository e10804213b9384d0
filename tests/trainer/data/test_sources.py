import bz2
import gzip
import io
import json
import lzma
import math
import zipfile

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mopo_trainer.data import DataError, load_rows, to_groups

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}

ROWS = [
    {"prompt": "Why?", "responses": ["Because.", "No."], "ratings": {"zeal": [5, 4.67], "care": [1, 2]}},
    {"prompt": "How?", "responses": ["So.", "Thus."], "comparisons": {"care": [[0, 1, 0.5]]}, "note": "ü"},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("any.name", content)
    return file.getvalue()


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


def test_a_column_that_mixes_types_is_kept_row_by_row(tmp_path):
    rows = [{**PAIR, "note": 1, "big": 2**70}, {**PAIR, "note": "1"}, {**PAIR, "note": {"deep": [[1]]}, "f": math.inf}]
    loaded = load_rows(write(tmp_path / "a.jsonl", lines(rows)))
    assert loaded["note"][:] == [1, "1", {"deep": [[1]]}]
    assert len(to_groups(loaded)) == 3
    chat = {"prompt": [{"role": "user", "content": "b"}]}
    chat |= {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    with pytest.raises(DataError, match=r"b\.jsonl: row 1 \(line 2\): plain text and messages in one dataset"):
        to_groups(load_rows(write(tmp_path / "b.jsonl", lines([PAIR, chat]))))


def test_objects_with_names_of_their_own_and_deep_ones(tmp_path):
    deep = json.loads("[" * 200 + "]" * 200)
    rows = [{**PAIR, "by_id": {f"id{i}": i}, "deep": deep} for i in range(1100)]
    assert len(to_groups(load_rows(write(tmp_path / "a.jsonl", lines(rows))))) == 1100


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "txt"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd, zipped])
def test_compression_is_told_by_the_bytes(tmp_path, compress, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(compress(lines(ROWS)))
    check_rows(load_rows(path))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd, zipped])
def test_archives_cut_short(tmp_path, compress):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(compress(lines(ROWS))[:-8])
    with pytest.raises(DataError, match=r"rows\.jsonl: the \w+ file is cut short or damaged") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


def test_zip_of_two_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(DataError, match=r"two\.zip: the zip file holds 2 files \(a\.jsonl, b\.jsonl\)"):
        load_rows(tmp_path / "two.zip")


BOM = b"\xef\xbb\xbf"
PAIRS = [PAIR, {**PAIR, "prompt": "\u00fc \U0001f600"}]


@pytest.mark.parametrize(
    "content",
    [
        BOM + json.dumps(PAIRS).encode(),
        BOM + lines(PAIRS),
        gzip.compress(BOM + lines(PAIRS), mtime=0),
        BOM + lines(PAIRS[:1]) + BOM + lines(PAIRS[1:]),
        lines(PAIRS).replace(b"\n", b"\r\n\r\n"),
        b" \n\n" + json.dumps(PAIRS, indent=1).encode(),
        json.dumps(PAIRS).encode("utf-16"),
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS).encode("utf-16"),
        lines(PAIRS).decode().encode("utf-16-le"),
        json.dumps({"prompt": [row["prompt"] for row in PAIRS], "chosen": ["a"] * 2, "rejected": ["b"] * 2}).encode(),
        json.dumps({key: {str(i): row[key] for i, row in enumerate(PAIRS)} for key in PAIR}, indent=2).encode(),
        json.dumps({str(i): row for i, row in enumerate(PAIRS)}).encode(),
        json.dumps({"columns": list(PAIR), "index": [0, 1], "data": [list(row.values()) for row in PAIRS]}).encode(),
        *(
            json.dumps({name: PAIRS, "v": 1}).encode()
            for name in ("data", "rows", "train", "examples", "instances", "records")
        ),
        json.dumps({"data": {key: [row[key] for row in PAIRS] for key in PAIR}}).encode(),
        json.dumps({"data": {"train": PAIRS, "test": PAIRS[:1]}}).encode(),
        json.dumps({"train": PAIRS, "test": PAIRS[:1]}, indent=2).encode(),
        json.dumps(
            {"rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(PAIRS)]}
        ).encode(),
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_layouts_of_json(tmp_path, name, content):
    loaded = load_rows(write(tmp_path / name, content))
    assert [{key: row[key] for key in PAIR} for row in loaded.to_list()] == PAIRS


def test_one_row_of_messages_is_one_row(tmp_path):
    row = {"prompt": [{"role": "user", "content": "a"}], "responses": [[{"role": "assistant", "content": "b"}]]}
    assert load_rows(write(tmp_path / "one.json", json.dumps(row, indent=2).encode())).to_list() == [row]


def test_half_an_emoji_and_nan_in_a_file(tmp_path, caplog):
    text = json.dumps({**PAIR, "chosen": "cut \ud83d", "preference": math.nan, "f": 0}) + "\n"
    raw = json.dumps({**PAIR, "rejected": "\ud83d"}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    loaded = load_rows(write(tmp_path / "rows.jsonl", text.replace('"f": 0', '"f": 1e999').encode() + raw))
    assert loaded["chosen"][0] == "cut \ufffd"
    assert loaded["rejected"][1] == "\ufffd"
    assert "rows.jsonl: 2 texts hold half a character" in caplog.text
    assert "rows.jsonl: 1 values are NaN" in caplog.text
    assert to_groups(loaded)["win_rate"][0] == {"preferred": [1.0, 0.0]}


def test_broken_lines_are_counted_or_skipped(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", lines(PAIRS) + b'\n{"prompt": \n[1]\n' + lines([{**PAIR, "chosen": ""}]))
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 4: not valid JSON .*\(2 of 5 rows are bad: 1 not valid JSON, 1"
    ):
        load_rows(path)
    loaded = load_rows(path, on_bad_row="skip")
    assert "2 of 5 rows or prompts left out: 1 not valid JSON, 1 no object" in caplog.text
    with pytest.raises(DataError, match=r"rows\.jsonl: row 2 \(line 6\): the response 0 is empty"):
        to_groups(loaded)
    with pytest.raises(DataError, match=r"rows\.jsonl: row 0: the response 0 is empty"):
        to_groups(loaded.select([2, 0]))
    assert len(to_groups(loaded, on_bad_row="skip")) == 2


def test_arrow_files_and_types_that_datasets_lacks(tmp_path):
    preference = pa.array([[("help", 1.0)]], pa.map_(pa.string(), pa.float64()))
    columns = {"prompt": pa.array(["p"]).dictionary_encode(), "chosen": pa.array(["a"], pa.large_string())}
    table = pa.table({**columns, "rejected": pa.array(["b"]), "preference": preference})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert to_groups(load_rows(tmp_path / name))["win_rate"][:] == [{"help": [1.0, 0.0]}]


def test_clone_of_a_hub_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    for shard in range(2):
        Dataset.from_list([PAIRS[shard]]).to_parquet(tmp_path / f"data/train-0000{shard}-of-00002.parquet")
    Dataset.from_list([{**PAIR, "chosen": ""}]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    assert load_rows(tmp_path)["prompt"][:] == [row["prompt"] for row in PAIRS]
    assert len(load_rows(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match=r"no split 'valid'; it has: train, test"):
        load_rows(tmp_path, split="valid")
    (tmp_path / "data/train-00001-of-00002.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet: a pointer of git-lfs .*run `git lfs pull`"):
        load_rows(tmp_path)


def test_clone_with_configurations(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl.xz").write_bytes(lzma.compress(lines([{**PAIR, "prompt": name}])))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert load_rows(tmp_path, name="de")["prompt"][:] == ["de"]
    with pytest.raises(DataError, match=r"Please pick one among the available configs: \['en', 'de'\]"):
        load_rows(tmp_path)


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
        ("page.json", b"<!DOCTYPE html><html>", r"page\.json: a web page, perhaps a login"),
        ("comma.json", b'[{"prompt": "a"},\n]', r"comma\.json: not valid JSON \(.* column"),
        ("comma.jsonl", b'{"prompt": "a",}\n', r"comma\.jsonl, line 1: not valid JSON"),
        ("deep.jsonl", b"{}\n" + b'{"a": ' + b"[" * 9999 + b"\n", r"deep\.jsonl, line 2: not valid JSON \(nested too"),
        ("zeros.jsonl", b"\0" * 9, r"zeros\.jsonl"),
        (
            "columns.json",
            b'{"prompt": ["a"], "chosen": ["b", "c"]}',
            r"columns of different lengths \(prompt 1, chosen 2",
        ),
        ("splits.json", b'{"test": [{"prompt": "a"}]}', r"splits\.json: no split 'train'; it has: test"),
        (
            "view.json",
            b'{"rows": [{"row_idx": 0, "row": {}, "truncated_cells": ["prompt"]}]}',
            r"viewer cut prompt short",
        ),
        ("rows.jsonl.lz4", b"\x04\x22M\x18", r"rows\.jsonl\.lz4: unknown kind of file; give one of"),
        ("rows.csv", b"a,b\n", r"rows\.csv: unknown kind of file; give one of \.jsonl"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_the_mend_told_for_csv_works(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\np,a,b\n")
    with pytest.raises(DataError, match=r"Dataset\.from_csv\(\.\.\)\.to_json\(\.\.\) writes JSON Lines"):
        load_rows(tmp_path / "rows.csv")
    Dataset.from_csv(str(tmp_path / "rows.csv"), cache_dir=tmp_path).to_json(tmp_path / "rows.jsonl")
    assert to_groups(load_rows(tmp_path / "rows.jsonl"))["win_rate"] == [{"preferred": [1.0, 0.0]}]


def test_an_object_by_names_of_its_own_is_refused_in_one_short_line(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({f"id{i}": PAIR for i in range(900)}, indent=1).encode())
    with pytest.raises(DataError, match=r"unknown columns \(columns: id0, .*, 880 more\)") as caught:
        to_groups(load_rows(path))
    assert len(str(caught.value)) < 600 + len(path)


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
