"""Rows from a file or a hub data set: JSON, JSON lines, CSV and Parquet, the first three also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from fedeat.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""File kinds that are read, each also gzipped as `.gz` except Parquet."""
_OTHER_SUFFIXES = (".gz", ".zip", ".txt", ".tsv", ".xlsx", ".xls", ".arrow", ".ndjson", ".xml", ".yaml")
"""Kinds that are not, but are files all the same."""
_LONGEST_CELL = 2**31 - 1
"""Characters a CSV cell may have; the csv module's own limit would refuse a long document."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON list, JSON lines, CSV or Parquet file, the first three also gzipped.

    Raises:
        DataError: the file is missing, of another kind, broken or empty, or holds rows that are not objects or
            texts that are not Unicode.
    """
    readers = {".json": _json_rows, ".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    rows = readers[_kind(path)](path)
    if not rows:
        raise DataError(f"{path} holds no rows. Expected at least one example.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected an object with named fields, got {type(row).__name__}.")
        for name, value in row.items():
            if isinstance(value, str) and not _is_unicode(value):
                raise DataError(
                    f"{path}, row {number}: field {name!r} holds half of a surrogate pair (\\ud800 to \\udfff), which "
                    "is no character. Remove it."
                )
    return rows


def read_hub(name: str, *, split: str = "train") -> list[dict[str, Any]]:
    """Rows of one split of a data set on the Hugging Face hub.

    Raises:
        DataError: the data set cannot be loaded, for example because there is no network.
    """
    import datasets  # heavy, and needed for hub names alone

    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except Exception as error:
        raise DataError(
            f"data set {name!r} (split {split!r}) could not be loaded: {error}. Expected a local file "
            f"({', '.join(SUFFIXES)}) or a data set name on a hub this machine can reach."
        ) from error


def is_local(source: str) -> bool:
    """Whether a data source names a file rather than a data set on the hub."""
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") > 1  # a hub name has one at most
    return path.exists() or looks_local or path.name.lower().endswith((*SUFFIXES, *_OTHER_SUFFIXES))


def _kind(path: Path) -> str:
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix) or (name.endswith(f"{suffix}.gz") and suffix != ".parquet"):
            return suffix
    what = "is a directory" if path.is_dir() else "is of a kind that is not read"
    raise DataError(f"{path} {what}. Expected one of {', '.join(SUFFIXES)}, or the first three with .gz.")


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a directory. Expected a data file; name one of the files in it.")
    if not path.exists():
        raise DataError(f"data file {path} does not exist. Check the path; a relative one starts at {Path.cwd()}.")


def _read_text(path: Path) -> str:
    _require_file(path)
    try:
        data = path.read_bytes()
        # A byte-order mark, which spreadsheet programs write, is no part of the text.
        return (gzip.decompress(data) if path.name.lower().endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Is the file complete?") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Convert it to UTF-8.") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from None


def _not_json(where: str, error: Exception) -> DataError:
    # Beside syntax errors: numbers of thousands of digits (ValueError), nesting without end (RecursionError).
    return DataError(f"{where} is not valid JSON: {error}. Is the file complete?")


def _json_lines(path: Path) -> list[Any]:
    return _parse_lines(_read_text(path), path)


def _parse_lines(text: str, path: Path) -> list[Any]:
    # Not str.splitlines(): it also breaks at characters such as U+2028 that JSON strings may hold.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _json_rows(path: Path) -> list[Any]:
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # many data sets name JSON lines ".json"
            return _parse_lines(text, path)
        raise _not_json(str(path), error) from None
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        for key in ("data", "rows", "examples", "train"):
            if isinstance(value.get(key), list):
                return list(value[key])
        return [value]
    raise DataError(f"{path} holds a JSON {type(value).__name__}. Expected a list of objects.")


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows = []
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise DataError(f"{path}: a column name stands twice in the header {', '.join(names)}. Rename one.")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(names)} cells as in the header, got "
                    f"{'more' if None in row else 'fewer'}. Quote texts that hold commas or line breaks."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not valid CSV: {error}. Is the file complete?") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    _require_file(path)
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow.") from None
    try:
        return list(parquet.read_table(path).to_pylist())
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.") from None


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
