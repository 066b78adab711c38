"""Examples and batches as values, and how examples are read: JSON, JSON lines, CSV, Parquet, or a hub data set.

Instruction rows become (prompt, answer) pairs (Sec. 6.1); `evaluation.tasks` makes examples of GLUE rows. How an
example becomes tokens is in `encoding`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedeat.errors import DataError

Row: TypeAlias = Mapping[str, Any]

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""File kinds that are read, each also gzipped as `.gz` except Parquet."""


@dataclass(frozen=True)
class Example:
    """One training or evaluation example, before tokenisation.

    Attributes:
        prompt: what the model is shown: the whole instruction (causal-lm) or the first text (sequence-classification).
        answer: the text to be learned (causal-lm); "" for sequence-classification.
        pair: the second text of a pair (sequence-classification), else None.
        label: class index, None for free text.
        task: task name such as "sst2", or "" for free instruction data.
        group: value of the partition column ("category", "client", ...), else None.
    """

    prompt: str
    answer: str = ""
    pair: str | None = None
    label: int | None = None
    task: str = ""
    group: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example.

    Attributes:
        input_ids: at most `max_length` ids.
        perturbable: one flag a token, True where a perturbation may act.
        answer_start: index of the first supervised token; `len(input_ids)` where none is supervised.
        label: class index for sequence classification, -1 where unknown, else None.
        classes: `(start, stop)` of the classes this example may get; a head a task is a block of one head's rows.
        token_type_ids: segment ids where the tokenizer makes them, else None.
        cut: "" or what truncation took: "prompt", "answer".
    """

    input_ids: tuple[int, ...]
    perturbable: tuple[bool, ...]
    answer_start: int
    label: int | None = None
    classes: tuple[int, int] | None = None
    token_type_ids: tuple[int, ...] | None = None
    cut: str = ""


@dataclass(frozen=True)
class Batch:
    """Tokens of B samples padded on the right to T, and what of them is supervised.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, T) int64, 1 at tokens, 0 at padding.
        perturbable: (B, T) bool, True where a perturbation may act: prompt tokens, never padding, special tokens
            or the answer.
        rows: (N,) int64, flat positions `b * T + t` whose logits are supervised, sorted; for sequence
            classification `arange(B)`, one pooled row a sample.
        targets: (N,) int64, the token or class that each supervised row must predict.
        samples: (N,) int64, the sample b in 0..B-1 that each supervised row belongs to.
        classes: (B, 2) int64 `start, stop` of the classes a sample may get (sequence classification), else None.
        token_type_ids: (B, T) int64 where the tokenizer makes them (BERT pairs), else None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    perturbable: Tensor
    rows: Tensor
    targets: Tensor
    samples: Tensor
    classes: Tensor | None = None
    token_type_ids: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def read_json(path: Path) -> Any:
    """The one JSON value in a `.json` or `.json.gz` file.

    Raises:
        DataError: the file is missing, unreadable, or not JSON.
    """
    return _parse(_read_text(path), str(path))


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
    return path.exists() or path.is_absolute() or source.startswith(".") or path.name.endswith((*SUFFIXES, ".gz"))


# The names that public instruction sets use: Alpaca, Dolly, and plain pairs. The first that is present counts.
INSTRUCTION_FIELDS = ("instruction", "prompt", "question", "query")
INPUT_FIELDS = ("input", "context")
OUTPUT_FIELDS = ("output", "response", "answer", "completion")


def instruction_examples(rows: Sequence[Row], *, source: str, column: str | None = None) -> list[Example]:
    """Instruction rows as examples: Alpaca's, Dolly's, or any with a prompt-like and an answer-like field.

    A row whose prompt or answer is blank teaches nothing and is left out; `len(rows)` less the length of the result
    says how many were.

    Args:
        rows: objects with one of `INSTRUCTION_FIELDS`, one of `OUTPUT_FIELDS` and perhaps one of `INPUT_FIELDS`.
        source: where the rows come from, for messages.
        column: field to keep as `Example.group`, None for none.

    Raises:
        DataError: a row lacks a field it must have, or a field is not text; names the row. Or all rows are blank.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        instruction = _text(row, INSTRUCTION_FIELDS, source, number)
        answer = _text(row, OUTPUT_FIELDS, source, number)
        extra = next((str(row[name]) for name in INPUT_FIELDS if row.get(name)), "")
        group = None if column is None else _group(row, column, source, number)
        prompt = "\n\n".join(part for part in (instruction, extra) if part.strip())
        if prompt and answer.strip():
            examples.append(Example(prompt, answer, group=group))
    if rows and not examples:
        raise DataError(f"{source}: every row has a blank prompt or a blank answer. Expected rows to learn from.")
    return examples


def _text(row: Row, names: Sequence[str], source: str, number: int) -> str:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise DataError(
            f"{source}, row {number} has none of the fields {', '.join(names)}. Expected Alpaca fields (instruction, "
            f"input, output), got {', '.join(sorted(map(str, row))) or 'no field'}. Rename the columns."
        )
    if not isinstance(row[name], str):
        raise DataError(f"{source}, row {number}: field {name!r} must be text, got {type(row[name]).__name__}.")
    return str(row[name])


def _group(row: Row, column: str, source: str, number: int) -> str:
    if row.get(column) is None:
        raise DataError(
            f"{source}, row {number} has no column {column!r} to partition by. Got {', '.join(sorted(map(str, row)))}. "
            "Set partition.by to one of these."
        )
    return str(row[column])


def _kind(path: Path) -> str:
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix) or (name.endswith(f"{suffix}.gz") and suffix != ".parquet"):
            return suffix
    raise DataError(
        f"{path} is of a kind that is not read. Expected one of {', '.join(SUFFIXES)}, or the first three with .gz."
    )


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
