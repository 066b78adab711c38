"""What a configuration names as data: training examples, evaluation sets, and the examples of each client."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedeat import evaluation, seeding
from fedeat.config import Config, PartitionSection, Source
from fedeat.data import OUTPUT_FIELDS, Example, instruction_examples, is_local, partition, read_hub, read_rows
from fedeat.errors import ConfigError, DataError
from fedeat.evaluation import EvaluationSet, tasks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What the clients train on.

    Attributes:
        examples: all of them.
        left_out: how many rows were not taken: "blank" without a prompt or an answer, "excluded" by
            `partition.exclude`.
        sizes: how many of the examples each entry of data.train gave.
    """

    examples: list[Example]
    left_out: Mapping[str, int]
    sizes: tuple[int, ...] = ()


def training_examples(config: Config) -> list[Example]:
    """All training examples of a configuration; as `training_data`, without what was left out."""
    return training_data(config).examples


def training_data(config: Config) -> TrainingData:
    """All training examples of a configuration: classification tasks by their columns, else instructions.

    Raises:
        ConfigError: the configuration names no data.
        DataError: a file is broken, a classifier is given free text, a value to exclude is in no row, or a client's
            file has no other.
    """
    if not config.data.train:
        raise ConfigError(["data.train is empty. Expected at least one file or data set to train on."])
    column = None if config.partition.by == "label" else config.partition.by
    examples: list[Example] = []
    ends: list[int] = []
    blank = 0
    for source in config.data.train:
        rows = source_rows(source)
        if source.task is not None or _has_labels(rows[0]):
            examples += tasks.examples(rows, source.task, config.task, source=source.path, group_column=column)
        elif config.task == "sequence-classification":
            raise DataError(
                f"{source.path} has no labels to classify: its columns are {', '.join(sorted(rows[0]))}. Expected GLUE "
                'columns (sentence, label; question1, question2, label; ...), or set task = "causal-lm".'
            )
        else:
            found = instruction_examples(rows, source=source.path, column=column)
            blank += len(rows) - sum(not example.away for example in found)
            examples += found
        ends.append(len(examples))
    excluded = frozenset(config.partition.exclude)
    kept = [example for example in examples if example.group not in excluded]
    sizes = tuple(
        sum(example.group not in excluded for example in examples[start:end])
        for start, end in itertools.pairwise([0, *ends])
    )
    absent = sorted(excluded - {example.group for example in examples})
    if absent:
        present = ", ".join(sorted({str(example.group) for example in examples})[:20])
        raise DataError(
            f"partition.exclude names {', '.join(absent)}, which is in no row's {column!r}. There are {present}. "
            "Correct the value or remove it."
        )
    for source, size in zip(config.data.train, sizes, strict=True):
        if config.partition.kind == "file" and not size:
            raise DataError(
                f"partition.exclude leaves nothing of {source.path}, which is a client's data where partition.kind is "
                '"file". Expected at least one row; remove the file from data.train.'
            )
    if blank:
        _log.info("%d training rows have a blank prompt or answer and were left out.", blank)
    return TrainingData(kept, {"blank": blank, "excluded": len(examples) - len(kept)}, sizes)


def absolute_paths(config: Config) -> dict[str, Any]:
    """Dotted key -> value, for a process in another directory: files and the model's directory as absolute paths."""

    def absolute(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    changed: dict[str, Any] = {"model.name": absolute(config.model.name)}
    for key, sources in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        changed[key] = [{**entry.model_dump(exclude_none=True), "path": absolute(entry.path)} for entry in sources]
    changed["evaluation.refusals"] = [absolute(file) for file in config.evaluation.refusals]
    return changed


def _has_labels(row: Mapping[str, Any]) -> bool:
    return "label" in row and not any(name in row for name in OUTPUT_FIELDS)


def source_rows(source: Source) -> list[dict[str, Any]]:
    """Rows of one source, at most its limit: a random part that is the same in every run.

    Raises:
        DataError: it cannot be read.
    """
    rows = read_rows(Path(source.path)) if is_local(source.path) else read_hub(source.path, split=source.split)
    return [rows[i] for i in _limited(len(rows), source.limit)]


def evaluation_sets(sources: Sequence[Source]) -> list[EvaluationSet]:
    """What the sources hold to evaluate on; a limit applies to benign rows, pairs are always whole.

    Raises:
        DataError: a file is broken or holds nothing to evaluate on.
    """
    found = []
    for source in sources:
        entry = evaluation.read_evaluation(source.path, source.task)
        kept = _limited(len(entry.benign), source.limit)
        found.append(replace(entry, benign=tuple(entry.benign[i] for i in kept)))
    return found


def _limited(count: int, limit: int | None) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=seeding.generator(0, "limit"))[:limit].tolist())


def answerable(sets: Sequence[EvaluationSet], heads: Collection[str] | None) -> list[EvaluationSet]:
    """What of the sets a model can answer. What is left out is told to the log, a line each.

    Args:
        sets: what the evaluation files hold.
        heads: the tasks a classifier has heads for; None for a model that answers in words, and so all.

    Raises:
        DataError: there was something to evaluate on, and nothing of it is left.
    """
    kept = list(sets) if heads is None else [evaluation.only(entry, heads) for entry in sets]
    if heads is not None and sets and not any(entry.benign or entry.pairs for entry in kept):
        present = sorted({task for entry in sets for task in _tasks(entry)})
        raise DataError(
            f"nothing to evaluate: the data is of {', '.join(present)}, and the classifier has heads for "
            f"{', '.join(heads) or 'nothing'}. Give data of a task that the model was trained on."
        )
    for note in dict.fromkeys(note for entry in kept for note in entry.notes):
        _log.info("%s", note)
    return kept


def _tasks(entry: EvaluationSet) -> set[str]:
    return {item.task for item in entry.benign} | {pair.task for pair in entry.pairs}


def split_examples(config: Config, examples: Sequence[Example], sizes: Sequence[int] = ()) -> partition.Partition:
    """The examples of each client.

    Args:
        config: the run's.
        examples: all training examples, in the order of data.train.
        sizes: how many of them each entry of data.train gave; a partition by file needs it.

    Raises:
        DataError: there are fewer examples than clients or clients than tasks, or free text is to be skewed by label.
    """
    section = config.partition
    if section.kind == "iid":
        return partition.iid(len(examples), section.clients, seed=config.seed)
    if section.kind == "column":
        return partition.by_column([example.group or "" for example in examples])
    if section.kind == "file":
        return tuple(
            tuple(range(end - size, end)) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
        )
    if section.kind == "quantity":
        return partition.quantity(len(examples), section.clients, alpha=section.alpha, seed=config.seed)
    if section.kind == "task":
        names = [example.task or "text" for example in examples]
        return partition.by_task(names, section.clients, seed=config.seed)
    if section.by == "label" and any(example.label is None for example in examples):
        raise DataError(
            'free instruction data has no labels to skew by. Set partition.by to a column such as "category", or '
            'partition.kind = "iid".'
        )
    groups = [group_name(example, section.by) for example in examples]
    return partition.dirichlet(groups, section.clients, alpha=section.alpha, seed=config.seed)


def partition_name(section: PartitionSection) -> str:
    """A partition in words: what a table calls it."""
    names = {
        "iid": "even",
        "dirichlet": f"Dirichlet {section.alpha:g} by {section.by}",
        "quantity": f"Dirichlet {section.alpha:g} in amount",
        "task": "one task a client",
        "column": f"by column {section.by}",
        "file": "a file a client",
    }
    return names[section.kind]


def group_name(example: Example, by: str = "label") -> str:
    """What an example is counted as: its task and answer, or the value of its column where `by` names one."""
    if by != "label" and example.group is not None:
        return example.group
    return f"{example.task}:{tasks.TASKS[example.task].answers[example.label]}" if example.label is not None else "text"
