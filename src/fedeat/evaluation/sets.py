"""Evaluation files: benign GLUE rows, and pairs of an original text and its adversarial modification.

Three shapes are told apart by content:

- TrustLLM's AdvGLUE: a list of prompts with "type" original or modified; a pair shares "task" and "index";
- AdvGLUE dev with its originals: rows whose modified columns stand beside "original_sentence" and the like, as a
  dictionary from task to rows or as plain rows;
- GLUE rows with a label, which are benign.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedeat.data import read_rows
from fedeat.errors import DataError
from fedeat.evaluation import tasks
from fedeat.evaluation.tasks import Item

_ORIGINAL = "original_"


@dataclass(frozen=True)
class Pair:
    """An original text and its adversarial modification, which keeps the label.

    Attributes:
        task: a name in `tasks.TASKS`.
        index: the pair's number or name within the task, as the file has it.
        original: the unperturbed text.
        modified: the perturbed text, of the same label.
        label: class index of both.
        method: the attack that made the modification, "" where the file does not say.
        group: id of the distinct original text: pairs of one original share it, also over files. Spellings that
            differ in case, spaces or punctuation alone are one original.
    """

    task: str
    index: int | str
    original: Item
    modified: Item
    label: int
    method: str
    group: str


@dataclass(frozen=True)
class EvaluationSet:
    """What one file holds to evaluate on.

    Attributes:
        source: the file, as errors and reports name it.
        benign: labelled texts without an adversarial side.
        pairs: original/modified pairs.
        notes: what was left out and why, one line each.
    """

    source: str
    benign: tuple[Item, ...] = ()
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()


def read_evaluation(path: str | Path, task: str | None = None) -> EvaluationSet:
    """The benign rows or the pairs of an evaluation file, whichever it holds.

    Args:
        path: JSON, JSON lines, CSV or Parquet, gzip or not.
        task: the task of benign rows, told by their columns where None; of pairs only this task's are kept.

    Raises:
        DataError: the file cannot be read, has none of the three shapes, or a row of it is broken.
    """
    if task is not None:
        tasks.named(task)
    source = str(path)
    rows: list[Mapping[str, Any]] = list(read_rows(Path(path)))
    if len(rows) == 1 and rows[0] and all(isinstance(value, list) for value in rows[0].values()):
        return _only(_annotated(_by_task(rows[0], source), source, task), task)
    if any("prompt" in row and ("type" in row or "index" in row) for row in rows):
        return _only(_trustllm(rows, source), task)
    if any(str(name).startswith(_ORIGINAL) for row in rows for name in row):
        return _only(_annotated(rows, source, task), task)
    return EvaluationSet(
        source,
        benign=tuple(tasks.item(row, task, where=f"{source}, row {n}") for n, row in enumerate(rows, start=1)),
    )


def read_pairs(path: str | Path, task: str | None = None) -> list[Pair]:
    """The original/modified pairs of a file, of one task or of all.

    Raises:
        DataError: as `read_evaluation`, and where the file has no pairs.
    """
    found = read_evaluation(path, task)
    if not found.pairs:
        raise DataError(
            f"{path} has no original/modified pairs, only benign rows; expected TrustLLM's AdvGLUE JSON or AdvGLUE "
            'rows with "original_..." columns. Give such a file, or evaluate this one for accuracy alone'
        )
    return list(found.pairs)


def distinct_pairs(evaluation_sets: Sequence[EvaluationSet]) -> list[Pair]:
    """The pairs of all sets; one that two files hold counts once."""
    found: dict[tuple[Item, Item], Pair] = {}
    for pair in (pair for entry in evaluation_sets for pair in entry.pairs):
        found.setdefault((pair.original, pair.modified), pair)
    return list(found.values())


def _by_task(content: Mapping[str, Any], source: str) -> list[Mapping[str, Any]]:
    """Rows of a dictionary from task to rows, each with its "task"."""
    flat: list[Mapping[str, Any]] = []
    for task, rows in content.items():
        if task not in tasks.TASKS:
            raise DataError(
                f'{source}: unknown task "{task}"; expected lists of rows under {", ".join(tasks.TASKS)}. '
                "Rename the key, or write one JSON line a row"
            )
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{source}, {task} row {number}: expected an object with columns, got {type(row).__name__}. "
                    "Write each row as an object with the task's texts, their originals and a label"
                )
            flat.append({**row, "task": task})
    return flat


def _trustllm(rows: Sequence[Mapping[str, Any]], source: str) -> EvaluationSet:
    halves: dict[tuple[str, int | str], dict[str, tuple[int, Item, str]]] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        key, side, entry = _half(row, where)
        found = halves.setdefault(key, {})
        if side in found:
            raise DataError(
                f"{where}: a second {side} half of pair {key[0]} {key[1]}, whose first is row {found[side][0]}; "
                "expected one original and one modified row. Number the pairs of a task uniquely"
            )
        method = row.get("method")
        found[side] = (number, entry, method if isinstance(method, str) else "")
    pairs = []
    for (task, index), found in halves.items():
        if len(found) == 1:
            ((side, (number, _, _)),) = found.items()
            missing = "modified" if side == "original" else "original"
            raise DataError(
                f"{source}, row {number}: pair {task} {index} has no {missing} half; expected an original and a "
                f'modified row of the same "task" and "index". Add the {missing} row or remove this one'
            )
        number, original, _ = found["original"]
        other, modified, method = found["modified"]
        if original.label != modified.label:
            raise DataError(
                f"{source}, rows {number} and {other}: pair {task} {index} has label {original.label} on its original "
                f"and {modified.label} on its modification; expected the same label. Correct one of them"
            )
        pairs.append(_pair(index, original, modified, method))
    return EvaluationSet(source, pairs=tuple(pairs))


def _half(row: Mapping[str, Any], where: str) -> tuple[tuple[str, int | str], str, Item]:
    """One row of TrustLLM's list: its pair, its side and its text."""
    task, side, text = row.get("task"), row.get("type"), row.get("prompt")
    if not isinstance(task, str) or task not in tasks.TASKS:
        raise DataError(f'{where}: "task" is {task!r}; expected one of {", ".join(tasks.TASKS)}. Correct the row')
    if not isinstance(side, str) or side not in ("original", "modified"):
        raise DataError(f'{where}: "type" is {side!r}; expected "original" or "modified". Correct the row')
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "prompt" is {text!r}; expected the text of the instruction. Correct the row')
    label = tasks.label_of(task, row, where=where)
    item = Item(task, text, tasks.split_prompt(task, text), label)
    return (task, _index(row.get("index"), "index", where)), side, item


def _index(value: object, name: str, where: str) -> int | str:
    if isinstance(value, str) and value.strip():
        return int(value) if value.strip().isdecimal() else value.strip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f'{where}: "{name}" is {value!r}; expected a number or a name that the two rows of a pair share. '
            "Number the pairs of each task"
        )
    return value


def _annotated(rows: Sequence[Mapping[str, Any]], source: str, task: str | None) -> EvaluationSet:
    pairs = []
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        name = tasks.detect(row, where=where) if task is None or "task" in row else task
        index: int | str = counts[name]
        counts[name] += 1
        if "idx" in row:
            index = _index(row["idx"], "idx", where)
        fields = tasks.TASKS[name].fields
        # Written by hand against no original, such as CheckList's: nothing to be right on first.
        if not any(row.get(_ORIGINAL + field) for field in fields):
            left_out[name] += 1
            continue
        modified = tasks.item(row, name, where=where)
        before = {field: row.get(_ORIGINAL + field) or row[field] for field in fields}
        original = tasks.item({**before, "label": row["label"]}, name, where=where)
        method = row.get("method")
        pairs.append(_pair(index, original, modified, method if isinstance(method, str) else ""))
    if not pairs:
        raise DataError(
            f'{source}: none of its {len(rows)} rows has an original text ("original_sentence" and the like), so there '
            "is no pair to measure an attack on. Give AdvGLUE dev with its originals"
        )
    notes = tuple(f"{source}: {n} {name} rows without an original left out" for name, n in left_out.items())
    return EvaluationSet(source, pairs=tuple(pairs), notes=notes)


def _pair(index: int | str, original: Item, modified: Item, method: str) -> Pair:
    text = " ".join(original.texts) if original.texts is not None else original.prompt
    return Pair(original.task, index, original, modified, original.label, method, text_id(text))


def text_id(text: str) -> str:
    """Id of a text that ignores case, spaces and punctuation: 12 hexadecimal digits, equal over files and machines."""
    plain = "".join(character for character in text.lower() if character.isalnum())
    return hashlib.sha256((plain or text).encode()).hexdigest()[:12]


def only(found: EvaluationSet, names: Collection[str]) -> EvaluationSet:
    """What of a set is of these tasks, and a note on what is left out.

    A classifier's heads can be passed as the names: mismatched MNLI stays where MNLI is named.
    """

    def kept(item: Item | Pair) -> bool:
        return item.task in names or tasks.TASKS[item.task].head in names

    everything: list[Item | Pair] = [*found.benign, *found.pairs]
    left_out = Counter(item.task for item in everything if not kept(item))
    return EvaluationSet(
        found.source,
        benign=tuple(item for item in found.benign if kept(item)),
        pairs=tuple(pair for pair in found.pairs if kept(pair)),
        notes=(*found.notes, *(f"{found.source}: {n} {task} rows left out" for task, n in left_out.items())),
    )


def _only(found: EvaluationSet, task: str | None) -> EvaluationSet:
    """The pairs of one named task, or all for None."""
    if task is None:
        return found
    pairs = tuple(pair for pair in found.pairs if pair.task == task)
    if not pairs:
        present = ", ".join(sorted({pair.task for pair in found.pairs}))
        raise DataError(f"{found.source} has no {task} pairs; it has {present}. Name one of these, or no task")
    return EvaluationSet(found.source, pairs=pairs, notes=found.notes)
