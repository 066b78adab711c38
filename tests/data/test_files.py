"""Files of every kind, whole and broken, as rows."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedeat.data.files import is_local, read_hub, read_rows
from fedeat.errors import DataError

ROWS = [{"instruction": "Say hi, twice", "output": 'hi\n"hi"'}, {"instruction": "Füße?\u2028Ja", "output": "日本"}]
CSV = 'instruction,output\r\n"Say hi, twice","hi\n""hi"""\r\nFüße?\u2028Ja,日本\r\n'


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet as files

    files.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "list.json": lambda path: path.write_text(json.dumps(ROWS)),
    "unicode.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8"),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "lines.jsonl": lambda path: path.write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\r\n", encoding="utf-8"
    ),
    "mark.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig"),
    "packed.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "PACKED.JSONL.GZ": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "table.csv": lambda path: path.write_bytes(CSV.encode()),
    "mark.csv": lambda path: path.write_bytes(CSV.encode("utf-8-sig")),
    "packed.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "table.parquet": lambda path: parquet(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read_rows(tmp_path / name) == ROWS


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "truncated list": ("a.json", b'[{"a": 1}, {"a":', r"a\.json is not valid JSON"),
    "truncated line": ("a.jsonl", b'{"a": 1}\n{"a":', r"a\.jsonl, line 2 is not valid JSON"),
    "truncated line named json": ("a.json", b'{"a": 1}\n{"a":', r"a\.json, line 2 is not valid JSON"),
    "endless nesting": ("a.json", b"[" * 100_000, "not valid JSON"),
    "endless nesting in a line": ("a.jsonl", b"[" * 100_000, "line 1 is not valid JSON"),
    "endless number": ("a.json", b'[{"a": ' + b"1" * 5000 + b"}]", "not valid JSON"),
    "empty file": ("a.json", b"", r"a\.json holds no rows\. Expected at least one example"),
    "blank file": ("a.json", b" \n", "holds no rows"),
    "no lines": ("a.jsonl", b"\n\n", "holds no rows"),
    "empty list": ("a.json", b"[]", "holds no rows"),
    "scalar": ("a.json", b"3", "holds a JSON int. Expected a list"),
    "list of numbers": ("a.json", b"[1, 2]", "row 1: expected an object with named fields, got int"),
    "list in a line": ("a.jsonl", b'{"a": 1}\n[1]', "row 2: expected an object"),
    "half a surrogate pair": ("a.jsonl", b'{"a": "x\\ud800y"}', "row 1: field 'a' holds half of a surrogate pair"),
    "latin-1": ("a.jsonl", '{"a": "ü"}'.encode("latin-1"), "is not UTF-8 text"),
    "utf-16": ("a.csv", "a,b".encode("utf-16"), "is not UTF-8 text"),
    "not gzip": ("a.json.gz", b"[]", r"a\.json\.gz cannot be read"),
    "truncated gzip": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)[:-12], "cannot be read"),
    "damaged gzip": ("a.json.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff", "cannot be read"),
    "header alone": ("a.csv", b"a,b\n", "holds no rows"),
    "cell too many": ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: expected 2 cells as in the header, got more"),
    "cell too few": ("a.csv", b"a,b\n1,2\n1\n", "line 3: expected 2 cells as in the header, got fewer"),
    "open quote": ("a.csv", b'a,b\n1,"2\n3,4\n', "is not valid CSV"),
    "name twice": ("a.csv", b"a,a\n1,2\n", "a column name stands twice"),
    "not parquet": ("a.parquet", b"PAR1 no", "is not a readable Parquet file"),
    "parquet in gzip": ("a.parquet.gz", b"", "of a kind that is not read"),
    "other kind": ("a.txt", b"x", r"of a kind that is not read\. Expected one of \.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)


def test_a_cell_of_a_table_may_be_a_long_document(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "word " * 60_000
    (tmp_path / "a.csv").write_text(f'instruction,output\n"{text}",short\n')
    assert read_rows(tmp_path / "a.csv") == [{"instruction": text, "output": "short"}]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_missing_file_and_directory_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="is a directory"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("tatsu-lab/alpaca", False),
        ("glue", False),
        ("./x", True),
        ("/x", True),
        ("x.jsonl.gz", True),
        ("a/b.csv", True),
        ("data/nothere.txt", True),
        ("a/b/c", True),
        ("org/set-v1.2", False),
    ],
)
def test_local_file_is_told_from_hub_name(source: str, local: bool) -> None:
    assert is_local(source) == local


def test_hub_data_set_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'some/set' \(split 'train'\) could not be loaded: no network"):
        read_hub("some/set")
