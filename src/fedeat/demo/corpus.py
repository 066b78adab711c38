"""What the demo's base model is trained on before any federation: the world's texts, judged in other words.

The base reads the same kind of texts with the same judgements asked in other wordings and answered by other words, so
that what a judgement needs is in it. The wording of the paper's evaluation it meets as text alone, never with an
answer: it knows the words and stands near chance, which leaves the federation something to teach.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedeat.demo import world
from fedeat.evaluation import tasks

WORDINGS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sst2": (
        ("Review: {sentence}\nVerdict:", ("rubbish", "applause")),
        ("{sentence}\nHow did the writer feel?\nAnswer:", ("annoyed", "pleased")),
    ),
    "qqp": (
        ("First: {question1}\nSecond: {question2}\nThese two are", ("different", "alike")),
        ("One asks: {question1}\nAnother asks: {question2}\nWill one reply do?\nAnswer:", ("impossible", "enough")),
    ),
    "mnli": (
        ("Fact: {premise}\nClaim: {hypothesis}\nThe claim is", ("true", "unproven", "false")),
        ("Given: {premise}\nSomebody says: {hypothesis}\nWhat do we do?\nAnswer:", ("agree", "wonder", "object")),
    ),
    "qnli": (
        ("Asked: {question}\nRead: {sentence}\nThat is", ("told", "untold")),
        ("Wanted: {question}\nFound: {sentence}\nIs the search over?\nAnswer:", ("finished", "continues")),
    ),
}
"""Task -> other ways to ask for its judgement: the question, and the answer to each label."""


@dataclass(frozen=True)
class Document:
    """One training text of the base: what is shown, and the answer to learn, "" for text that is only read."""

    prompt: str
    answer: str


def corpus(*, seed: int, rare: float = 0.25, unjudged: float = 0.15) -> Iterator[Document]:
    """Endless documents.

    Args:
        seed: of the draws.
        rare: 0..1, share of words said by a rare synonym: the base has met the rare words.
        unjudged: 0..1, share of documents in the evaluation's wording, without an answer.
    """
    rng = random.Random(f"{seed}/corpus")
    speaker = world.Speaker(rng, "train", rare)
    while True:
        task = rng.choice(world.TASKS)
        row = world.make(task, rng.randrange(world.LABELS[task]), speaker).row()
        if rng.random() < unjudged:
            yield Document(tasks.prompt(task, row), "")
        else:
            question, answers = rng.choice(WORDINGS[task])
            yield Document(question.format_map(row), answers[row["label"]])
