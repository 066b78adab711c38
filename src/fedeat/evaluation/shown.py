"""What of its evaluation a model is shown: texts that its maximum length cuts, and pairs it cannot tell apart.

A pair whose two sides are the same tokens is right or wrong on both, so it counts as not broken whatever the model is.
A pair whose texts are the same already in its file is none of these: an attack that could not change a text says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedeat.data import Encoded
from fedeat.evaluation.robustness import IDENTICAL
from fedeat.evaluation.scoring import Scorer, asked
from fedeat.evaluation.sets import EvaluationSet, Pair, distinct_pairs
from fedeat.evaluation.tasks import TASKS, example

if TYPE_CHECKING:
    from fedeat.model import AdaptedModel


@dataclass(frozen=True)
class Shown:
    """What a model is shown of one task.

    Attributes:
        task: a name in `tasks.TASKS`.
        texts: benign texts and both sides of each pair.
        cut: how many of them are cut to the model's maximum length.
        pairs: original/modified pairs.
        same: how many of them have two texts that are the same tokens.
    """

    task: str
    texts: int
    cut: int
    pairs: int
    same: int

    @property
    def is_vacuous(self) -> bool:
        """Whether so many pairs are the same on both sides that the attack success rate is flagged."""
        return self.same > IDENTICAL * self.pairs

    def note(self, max_length: int) -> str:
        """What is lost, in a sentence or two; "" where nothing is."""
        parts = []
        if self.cut:
            parts.append(f"{self.cut} of {self.texts} evaluation texts do not fit into {max_length} tokens and are cut")
        if self.same:
            parts.append(
                f"{self.same} of {self.pairs} pairs are the same tokens on both sides, which counts as not broken"
            )
        remedy = " Raise data.max_length, or --max-length." if self.cut else ""
        return f"{self.task}: {'; '.join(parts)}.{remedy}" if parts else ""


def shown(
    model: AdaptedModel, evaluation_sets: Sequence[EvaluationSet], *, scorer: Scorer = "likelihood"
) -> list[Shown]:
    """What of each task's texts a model would be shown, in the order of `TASKS`; nothing is answered.

    Args:
        model: a causal language model or a classifier with a head for each task.
        evaluation_sets: what `read_evaluation` read.
        scorer: how a causal language model's answers are read.

    Raises:
        DataError: a classifier is given prompts whose texts cannot be told.
        ModelError: as `predict`, so that it is raised before any training.
    """
    benign = [item for entry in evaluation_sets for item in entry.benign]
    pairs = distinct_pairs(evaluation_sets)
    items = [*benign, *(pair.original for pair in pairs), *(pair.modified for pair in pairs)]
    tokens = asked(model, [example(item, model.kind) for item in items], scorer=scorer)
    originals, modified = tokens[len(benign) : len(benign) + len(pairs)], tokens[len(benign) + len(pairs) :]
    same = [pair.task for pair, *sides in zip(pairs, originals, modified, strict=True) if is_lost(pair, *sides)]
    cut = [item.task for item, found in zip(items, tokens, strict=True) if found.cut]
    texts = [item.task for item in items]
    tasks = [pair.task for pair in pairs]
    return [
        Shown(task, texts.count(task), cut.count(task), tasks.count(task), same.count(task))
        for task in TASKS
        if task in texts
    ]


def is_lost(pair: Pair, original: Encoded, modified: Encoded) -> bool:
    """Whether a pair's texts differ and a model is shown the same of both."""
    sides = [(side.input_ids, side.token_type_ids) for side in (original, modified)]
    return pair.original != pair.modified and sides[0] == sides[1]
