"""How accurate and how robust a model is: GLUE tasks, adversarial pairs, answers, attack success rate, intervals.

`read_evaluation` turns files into evaluation sets, `evaluate` a model and sets into a table's rows and the predictions
they were computed from. `task_row` makes the rows again from the predictions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedeat.data import Example
from fedeat.evaluation.robustness import JudgedPair, Row, TaskPredictions, average, is_win, rank, task_row
from fedeat.evaluation.scoring import Progress, Scorer, asked, predict
from fedeat.evaluation.sets import EvaluationSet, Pair, distinct_pairs, only, read_evaluation, read_pairs
from fedeat.evaluation.shown import is_lost, shown
from fedeat.evaluation.tasks import TASKS, Item, example

if TYPE_CHECKING:  # a report reads rows without loading a model library
    from fedeat.model import AdaptedModel

__all__ = [
    "TASKS",
    "EvaluationSet",
    "Item",
    "Pair",
    "Row",
    "TaskPredictions",
    "average",
    "evaluate",
    "is_win",
    "only",
    "predict",
    "rank",
    "read_evaluation",
    "read_pairs",
    "shown",
    "task_row",
]


def evaluate(
    model: AdaptedModel,
    evaluation_sets: Sequence[EvaluationSet],
    *,
    scorer: Scorer = "likelihood",
    batch_size: int = 32,
    seed: int = 0,
    triggered: Callable[[Item], Item | None] | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], dict[str, TaskPredictions]]:
    """Accuracy and attack success rate of a model on each task of the sets.

    A pair that two files hold counts once.

    Args:
        model: a causal language model or a classifier with a head for each task.
        evaluation_sets: what `read_evaluation` read.
        scorer: how a causal language model's answers are read.
        batch_size: sequences in a forward pass, >= 1.
        seed: of the bootstrap.
        triggered: puts a backdoor's trigger into a text and labels it with the answer it calls for, None where the
            text has that answer anyway; tried on a task's benign texts, or without any on its distinct originals.
        progress: told how many distinct texts are answered, and of how many.

    Returns:
        A row a task, in the order of `TASKS`, and the predictions by task.

    Raises:
        DataError: a classifier is given prompts whose texts cannot be told.
        ModelError: as `predict`.
    """
    benign = [item for entry in evaluation_sets for item in entry.benign]
    pairs = distinct_pairs(evaluation_sets)
    texts = [*benign, *(pair.original for pair in pairs), *(pair.modified for pair in pairs)]
    has_benign = {item.task for item in benign}
    originals = {(pair.task, pair.group): pair.original for pair in pairs if pair.task not in has_benign}
    clean = [*benign, *originals.values()]
    tried = [(item, found) for item in clean if triggered is not None and (found := triggered(item)) is not None]
    to_answer = [*texts, *(item for item, _ in tried), *(item for _, item in tried)]
    examples: list[Example] = [example(item, model.kind) for item in to_answer]
    given = asked(model, examples, scorer=scorer)
    answers = predict(model, examples, scorer=scorer, batch_size=batch_size, progress=progress, questions=given)
    first, second, third = len(benign), len(benign) + len(pairs), len(texts)
    predictions: dict[str, TaskPredictions] = {
        task: {"benign": {"labels": [], "predictions": []}, "pairs": [], "cut": 0}
        for task in TASKS
        if any(item.task == task for item in texts)
    }
    for item, seen in zip(texts, given[:third], strict=True):
        predictions[item.task]["cut"] += bool(seen.cut)
    for item, answer in zip(benign, answers[:first], strict=True):
        predictions[item.task]["benign"]["labels"].append(item.label)
        predictions[item.task]["benign"]["predictions"].append(answer)
    both_sides = zip(given[first:second], given[second:third], strict=True)
    for pair, original, modified, sides in zip(
        pairs, answers[first:second], answers[second:third], both_sides, strict=True
    ):
        judged: JudgedPair = {
            "index": pair.index,
            "group": pair.group,
            "label": pair.label,
            "original": original,
            "modified": modified,
            "method": pair.method,
        }
        predictions[pair.task]["pairs"].append({**judged, "same": True} if is_lost(pair, *sides) else judged)
    before, after = answers[third : third + len(tried)], answers[third + len(tried) :]
    for (_, item), without, with_ in zip(tried, before, after, strict=True):
        entry = predictions[item.task].setdefault("triggered", {"target": item.label, "clean": [], "predictions": []})
        entry["clean"].append(without)
        entry["predictions"].append(with_)
    return [task_row(task, found, seed=seed) for task, found in predictions.items()], predictions
