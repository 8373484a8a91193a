"""Records are read alike from every format, and what is wrong with a file is said at once, with its place."""

import importlib
import json
import os
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from etils.epath import backend
from support.buckets import Client, Store, use_stand_in
from support.data_sets import save_to_disk

from experiments.tasks.records import make_all, read_records, require, splits_of

ROWS = [
    {"prompt": [{"role": "user", "content": "Ä\u2028?"}], "answer": ["1", "2"], "tries": 3, "share": 0.5, "note": None},
    {"prompt": [{"role": "user", "content": "b"}], "answer": [], "tries": 2**60, "share": -1.0, "note": "n"},
]


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(path, split=None):
    return [record.fields for record in read_records(path, split)]


def test_every_format_gives_the_same_records_and_says_where_each_is(tmp_path):
    table, lines = pyarrow.Table.from_pylist(ROWS), [json.dumps(row) for row in ROWS]
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pyarrow.ipc.new_file(tmp_path / "data.arrow", table.schema) as file:
        file.write_table(table)
    written = {
        write(tmp_path / "lines.jsonl", "\n".join(lines)): "line 2",
        write(tmp_path / "windows", "\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n \n"): "line 4",
        write(tmp_path / "array.json", f"\ufeff\n [ {lines[0]}\n,\n\n{lines[1]} \n]\n"): "line 5",
        write(tmp_path / "indented.json", json.dumps(ROWS, indent=1)): "line 17",
        str(tmp_path / "data.parquet"): "row 1 (from 0)",
        str(tmp_path / "data.arrow"): "row 1 (from 0)",
        save_to_disk(tmp_path / "saved", ROWS): "row 1 (from 0)",
    }
    for path, place in written.items():
        records = read_records(path, "train")
        assert [record.fields for record in records] == ROWS, path
        assert records[1].place == f"{path}, {place}"


def test_a_folder_of_splits_gives_the_one_that_is_named(tmp_path):
    folder = save_to_disk(tmp_path / "all", {"train": ROWS[:1], "test": ROWS[1:]})
    assert splits_of(folder) == ("train", "test")
    assert rows(folder, "train") == ROWS[:1]
    assert rows(folder, "test") == rows(os.path.join(folder, "test")) == ROWS[1:]
    for split in (None, "validation"):
        with pytest.raises(ValueError, match=r"has the splits train, test.*as in .*all/train"):
            read_records(folder, split)


def test_columns_that_pandas_adds_for_its_row_labels_are_no_fields(tmp_path):
    table = pyarrow.table({"a": [1], "__index_level_0__": [7]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == [{"a": 1}]


def test_every_damaged_line_is_named_with_its_field(tmp_path):
    wrong = {
        '{"a": ': "it is not JSON: Expecting value at column 6",
        "[1]": "it is a list, not an object with fields",
        "3": "it is a number, not an object with fields",
        '"t"': "it is a text, not an object with fields",
        "null": "it is null, not an object with fields",
        '{"a": [0, {"b": NaN}]}': "'a[1].b' is NaN, which JSON does not have",
        '{"a": -Infinity}': "'a' is -Infinity, which JSON does not have",
        '{"a": 1e999}': "'a' is 1e999, which is beyond the largest float",
        '{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' stands twice in one object",
        '{"a": 1} {"a": 2}': "something follows after the object: ' {\"a\": 2}'",
    }
    for line, reason in wrong.items():
        path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{line}\n')
        with pytest.raises(ValueError) as caught:
            read_records(path)
        assert str(caught.value) == f"{path}, line 2: {reason}"
    for line, reason in {
        b'{"a": "\xff"}': "byte 7 is no text in UTF-8",
        b'{"a":' * 99_999: "nested too deeply",
    }.items():
        with pytest.raises(ValueError, match=rf"a.jsonl, line 1: .*{reason}"):
            read_records(write(tmp_path / "a.jsonl", line))


def test_all_mistakes_of_a_file_are_told_at_once_up_to_a_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}\n[1]\nx\n" + "2\n" * 10)
    with pytest.raises(ValueError) as caught:
        read_records(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"{path}, line {number}" for number in (2, 3, 4)]
    assert len(lines) == 11 and lines[-1] == "and 2 more"
    array = write(tmp_path / "a.json", '[{"a": 1, "a": 2},\n{"a": 1}, 7\n, {"a": NaN},\n{"a"}')
    with pytest.raises(ValueError) as caught:
        read_records(array)
    assert [line.removeprefix(f"{array}, ") for line in str(caught.value).splitlines()] == [
        "line 1: the key 'a' stands twice in one object",
        "line 2: it is a number, not an object with fields",
        "line 3: 'a' is NaN, which JSON does not have",
        "line 4: it is not JSON: Expecting ':' delimiter at column 5",
    ]


def test_what_is_no_data_set_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "folder").mkdir()
    half, broken, listless = (save_to_disk(tmp_path / name, ROWS) for name in ("half", "broken", "listless"))
    os.remove(os.path.join(half, "data-00001-of-00002.arrow"))
    write(tmp_path / "broken" / "data-00000-of-00002.arrow", b"\xff\xff\xff\xff\x00")
    write(tmp_path / "listless" / "state.json", "{}")
    wrong = {
        str(tmp_path / "none.jsonl"): "there is no file or folder .*: give a file with one JSON object per line",
        str(tmp_path / "folder"): "is no data set: it has no state.json",
        half: r"is not complete: data-00001-of-00002\.arrow of state\.json is not there",
        broken: r"data-00000-of-00002\.arrow is damaged",
        listless: r"state\.json is damaged: it lists no data files",
        "s3://bucket/a.jsonl": "download it first",
    }
    contents = {
        b"": "holds no record: it is empty",
        b" \n\r\n": "holds no record: it is empty",
        b"[ ]": "holds no record: it is empty",
        b'{\n"a": [1]\n}': "holds one object that goes over several lines",
        b'[{"a": 1}\n{"a": 2}]': "line 2: neither a comma nor the end of the array follows a record",
        b'[{"a": 1}': "line 1: neither a comma nor the end",
        b'[{"a": 1}]\n[{"a": 1}]': "something follows after the array",
        '{"a": 1}'.encode("utf-16"): "is text in UTF-16",
        b"\x1f\x8b\x08": r"is compressed \(gzip\): unpack it first",
        b"PK\x03\x04": r"is compressed \(zip\)",
        b"PAR1, cut short": "is damaged: ",
        b"ARROW1, cut short": "is damaged: ",
    }
    for number, (content, reason) in enumerate(contents.items()):
        wrong[write(tmp_path / f"wrong{number}", content)] = reason
    for path, reason in wrong.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_records(path)
        assert path in str(caught.value)


def test_without_pyarrow_a_sentence_names_what_to_install(tmp_path, monkeypatch):
    folder = save_to_disk(tmp_path / "saved", ROWS)
    monkeypatch.delitem(sys.modules, "experiments.tasks.arrow", raising=False)
    monkeypatch.delattr("experiments.tasks.arrow", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"saved is read with pyarrow, .* pip install 'rspo-jax\[data\]'"):
        read_records(folder)


def test_records_that_cannot_be_used_are_named_with_the_fields_that_they_have(tmp_path):
    records = read_records(write(tmp_path / "a.jsonl", '{"a": 1, "b": null}\n{"a": 1, "b": 2}\n{"c": 0}\n{}\n'))

    def b(fields):
        require(fields, "a", "b")
        return fields["b"]

    with pytest.raises(ValueError) as caught:
        make_all(records, b)
    assert [line.partition(", ")[2] for line in str(caught.value).splitlines()] == [
        "line 1: 'b' is missing or null; the record has 'a'",
        "line 3: 'a', 'b' are missing or null; the record has 'c'",
        "line 4: 'a', 'b' are missing or null; the record has nothing",
    ]
    assert make_all(records[1:2], b) == [2]


@pytest.fixture
def bucket(monkeypatch):
    """A stand-in for a bucket, at gs://bucket."""
    with Store() as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        use_stand_in()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield epath.Path("gs://bucket")
        server.shutdown()
    for name in Client.protocol:
        importlib.import_module("fsspec.registry")._registry.pop(name)
    backend.fsspec_backend._get_filesystem.cache_clear()


def test_data_in_a_bucket_is_read_like_that_of_a_disk(tmp_path, bucket):
    save_to_disk(tmp_path / "all", {"train": ROWS[:1], "test": ROWS})
    write(tmp_path / "all" / "lines.jsonl", "\n".join(map(json.dumps, ROWS)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "all" / "data.parquet")
    for path in [path for path in (tmp_path / "all").rglob("*") if path.is_file()]:
        (bucket / path.relative_to(tmp_path)).write_bytes(path.read_bytes())
    for name in ("lines.jsonl", "data.parquet", "test"):
        assert rows(f"gs://bucket/all/{name}") == ROWS
    assert rows("gs://bucket/all", "test") == ROWS
    with pytest.raises(ValueError, match=r"there is no file or folder gs://bucket/none"):
        read_records("gs://bucket/none.jsonl")
