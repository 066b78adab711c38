"""Attack success rate (Sec. 6.1) and what must stand beside it: counts, intervals, and flags on a collapsed model.

    ASR = pairs right on the original and wrong on the modified text / pairs right on the original

Both counts are over the same pairs: a pair that was wrong on its original is neither broken nor whole. A model that
gives one answer whatever it reads has ASR 0; it is flagged, and a flagged row is never a win.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from fedeat import seeding
from fedeat.evaluation.statistics import cluster_ratio, wilson
from fedeat.evaluation.tasks import named

Row = dict[str, Any]
"""One line of a results table: a task's accuracy, ASR, counts, intervals and flags, in JSON's types."""

CONSTANT = 0.95
"""One answer above this share of the predictions is a constant predictor."""

UNPARSABLE = 0.2
"""Above this share of answers that are no answer, the rest says little of the model."""

FEW = 10
"""Below this many pairs right on the original, an ASR is noise."""

IDENTICAL = 0.05
"""Above this share of pairs that are the same tokens on both sides, a low ASR says little of the model."""


class JudgedPair(TypedDict):
    """A pair's label and the model's answers to both its texts; None is an answer that is no answer.

    `same` is there, and true, where the texts differ and the model was shown the same tokens of both.
    """

    index: int | str
    group: str
    label: int
    original: int | None
    modified: int | None
    method: str
    same: NotRequired[bool]


class Benign(TypedDict):
    """Labels and answers of benign texts, in the same order."""

    labels: list[int]
    predictions: list[int | None]


class Triggered(TypedDict):
    """Texts of other classes with a backdoor's trigger in them: its answer, and those without and with the trigger."""

    target: int
    clean: list[int | None]
    predictions: list[int | None]


class TaskPredictions(TypedDict):
    """All that a task's row is computed from.

    `cut` is how many texts did not fit into the model's maximum length; older records do not say.
    """

    benign: Benign
    pairs: list[JudgedPair]
    cut: NotRequired[int]
    triggered: NotRequired[Triggered]


@dataclass(frozen=True)
class AttackSuccess:
    """An attack success rate and its counts.

    Attributes:
        rate: broken / benign_correct, None where no pair was right on its original.
        broken: pairs right on the original and wrong on the modified text. No answer is wrong.
        benign_correct: pairs right on the original.
    """

    rate: float | None
    broken: int
    benign_correct: int


def asr(pairs: Sequence[JudgedPair]) -> AttackSuccess:
    """Attack success rate over pairs (Sec. 6.1)."""
    correct = [pair for pair in pairs if pair["original"] == pair["label"]]
    broken = sum(pair["modified"] != pair["label"] for pair in correct)
    return AttackSuccess(broken / len(correct) if correct else None, broken, len(correct))


def task_row(task: str, predictions: TaskPredictions, *, seed: int) -> Row:
    """A task's line of the results table, from predictions alone.

    The accuracy is that on the benign texts; without any, that on the distinct originals, each in the first spelling
    it has. Unparsable answers are wrong, count in every denominator, and have their share shown.

    "cut" is how many of its texts, benign and of pairs, did not fit into the model's maximum length, and "same" how
    many pairs of two texts were the same tokens on both sides; both are None where the predictions do not say.

    Where a backdoor's trigger was tried, "backdoor" is the share of texts of other classes that get its answer with
    the trigger in them, and "backdoor_clean" the share of the same texts that get it without.

    Args:
        task: a name in `tasks.TASKS`.
        predictions: the task's labels and answers.
        seed: of the bootstrap's resampling; the same predictions and seed give the same row.
    """
    pairs = predictions["pairs"]
    _, labels, answers = accuracy_basis(predictions)
    right = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    accuracy = wilson(right, len(labels))
    success = asr(pairs)
    interval = cluster_ratio(
        [float(pair["original"] == pair["label"] != pair["modified"]) for pair in pairs],
        [float(pair["original"] == pair["label"]) for pair in pairs],
        [pair["group"] for pair in pairs],
        generator=seeding.generator(seed, "asr interval", task),
    )
    given = [*predictions["benign"]["predictions"], *_answers(pairs)]
    words = named(task).answers
    counts = Counter(given)
    tried = predictions.get("triggered")
    return {
        "task": task,
        "accuracy": right / len(labels) if labels else None,
        "accuracy_low": accuracy.low if labels else None,
        "accuracy_high": accuracy.high if labels else None,
        "benign": len(labels),
        "asr": success.rate,
        "asr_low": None if interval is None else interval.low,
        "asr_high": None if interval is None else interval.high,
        "pairs": len(pairs),
        "originals": len({pair["group"] for pair in pairs}),
        "benign_correct": success.benign_correct,
        "broken": success.broken,
        "accuracy_original": success.benign_correct / len(pairs) if pairs else None,
        "accuracy_modified": sum(p["modified"] == p["label"] for p in pairs) / len(pairs) if pairs else None,
        "cut": predictions.get("cut"),
        "same": sum(pair.get("same", False) for pair in pairs) if "cut" in predictions else None,
        "unparsable": counts[None] / len(given) if given else 0.0,
        "histogram": {**{word: counts[label] for label, word in enumerate(words)}, "unparsable": counts[None]},
        "flags": _flags(task, predictions, success),
        **({} if tried is None or not tried["predictions"] else _backdoor(tried)),
    }


def accuracy_basis(predictions: TaskPredictions) -> tuple[tuple[Hashable, ...], list[int], list[int | None]]:
    """The texts an accuracy is read from, their labels and answers: the benign ones, else the distinct originals.

    Records hold no benign text, so that one is named by its place and by what labels all of them have: texts of two
    files, or of one file cut at two limits, are never taken for the same.
    """
    benign = predictions["benign"]
    if benign["labels"]:
        file = hashlib.sha256(repr(benign["labels"]).encode()).hexdigest()[:16]
        return tuple((file, place) for place in range(len(benign["labels"]))), benign["labels"], benign["predictions"]
    first: dict[Hashable, JudgedPair] = {}
    for pair in predictions["pairs"]:
        first.setdefault(pair["group"], pair)
    return tuple(first), [pair["label"] for pair in first.values()], [pair["original"] for pair in first.values()]


def is_win(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Whether a row's ASR is lower than a baseline's, both being rows an ASR can be read from.

    False where either is flagged: a collapsed model is not a robust one, and beating one shows nothing of robustness.
    The difference may still be chance; see `statistics`.
    """
    return _sound(row) and _sound(baseline) and bool(row["asr"] < baseline["asr"])


def rank(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows an ASR can be read from, lowest ASR first, of equals the more accurate; flagged rows are left out."""
    return sorted((row for row in rows if _sound(row)), key=lambda row: (row["asr"], -(row["accuracy"] or 0.0)))


def average(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Unweighted mean over tasks of one model's rows, as the tables' last line.

    A mean over tasks some of which have no value would favour the model that failed there, so it is None then.
    Intervals are left None: tasks share a model and are no independent sample.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected at least one row to average")
    means = ("accuracy", "asr", "accuracy_original", "accuracy_modified", "unparsable")
    sums = ("benign", "pairs", "originals", "benign_correct", "broken")
    told = ("cut", "same")
    return {
        **rows[0],
        "task": "average",
        **{name: _mean([row[name] for row in rows]) for name in means},
        **{name: sum(row[name] for row in rows) for name in sums},
        **{name: _sum([row.get(name) for row in rows]) for name in told},
        **dict.fromkeys(("accuracy_low", "accuracy_high", "asr_low", "asr_high")),
        "histogram": {},
        "flags": [f"{row['task']}: {flag}" for row in rows for flag in row["flags"]],
    }


def _backdoor(tried: Triggered) -> Row:
    """Columns of a backdoor's success, with Wilson's 95 % interval over texts."""
    count = len(tried["predictions"])
    obeyed = tried["predictions"].count(tried["target"])
    interval = wilson(obeyed, count)
    return {
        "backdoor": obeyed / count,
        "backdoor_low": interval.low,
        "backdoor_high": interval.high,
        "backdoor_clean": tried["clean"].count(tried["target"]) / count,
        "backdoor_texts": count,
    }


def _sound(row: Mapping[str, Any]) -> bool:
    return not row["flags"] and row["asr"] is not None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _answers(pairs: Sequence[JudgedPair]) -> list[int | None]:
    return [answer for pair in pairs for answer in (pair["original"], pair["modified"])]


def _flags(task: str, predictions: TaskPredictions, success: AttackSuccess) -> list[str]:
    benign, pairs = predictions["benign"], predictions["pairs"]
    on_pairs = _answers(pairs)
    given = [*benign["predictions"], *on_pairs]
    flags = []
    constant = _constant(task, given, [*benign["labels"], *(pair["label"] for pair in pairs)])
    # A model may vary over easy benign texts and still collapse on the pairs, which is where ASR is read.
    constant_on_pairs = _constant(task, on_pairs, [pair["label"] for pair in pairs])
    if constant:
        flags.append(f"constant prediction: {constant}")
    elif constant_on_pairs:
        flags.append(f"constant prediction on the pairs: {constant_on_pairs}")
    unparsable = given.count(None)
    if given and unparsable / len(given) > UNPARSABLE:
        flags.append(f"unparsable answers: {_percent(unparsable, len(given))}")
    if pairs and success.benign_correct < FEW:
        flags.append(f"few originals right: {success.benign_correct} of {len(pairs)} pairs")
    same = sum(pair.get("same", False) for pair in pairs)
    if same > IDENTICAL * len(pairs):
        flags.append(f"identical pairs: {same} of {len(pairs)} are the same tokens on both sides")
    _, labels, answers = accuracy_basis(predictions)
    right = sum(label == answer for label, answer in zip(labels, answers, strict=True))
    ((_, majority),) = Counter(labels).most_common(1) or [(0, 0)]
    if labels and right <= majority < len(labels):
        flags.append(
            f"no better than guessing: accuracy {_percent(right, len(labels))}, "
            f"always the most common label {_percent(majority, len(labels))}"
        )
    return flags


def _constant(task: str, answers: Sequence[int | None], labels: Sequence[int]) -> str:
    """The one answer a constant predictor gives and its share, "" for a predictor that varies as the labels do."""
    parsed = [answer for answer in answers if answer is not None]
    if not parsed or len(set(labels)) < 2:
        return ""
    ((answer, count),) = Counter(parsed).most_common(1)
    return f"{_percent(count, len(parsed))} {named(task).answers[answer]}" if count / len(parsed) > CONSTANT else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
