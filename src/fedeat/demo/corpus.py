"""The text on which the demo's base model is pretrained.

It holds the world's stories, a dictionary of its rare words, and the world's four judgements asked in other wordings
with other answer words than the evaluation's. The evaluation's own prompts appear with an answer drawn at random: the
model learns that they are answered with one of their words, and nothing about which. So the base alone is at chance on
the four tasks, and fine-tuning has to bind what the model knows to how it is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from fedeat.demo import world
from fedeat.demo.lexicon import TABLES
from fedeat.evaluation import tasks


@dataclass(frozen=True)
class Document:
    """One text of the corpus: a prompt and its answer, or plain text with no answer."""

    prompt: str
    answer: str = ""


@dataclass(frozen=True)
class Wording:
    """Another way to ask for a task's judgement: the prompt with the row's fields, and one answer a label."""

    prompt: str
    answers: tuple[str, ...]


WORDINGS: dict[str, tuple[Wording, ...]] = {
    "sst2": (
        Wording("Is the critic sad or happy?\nSentence: {sentence}", ("sad", "happy")),
        Wording("Thumbs up or down?\nReview: {sentence}", ("down", "up")),
        Wording("Say whether the author is hostile or friendly.\nText: {sentence}", ("hostile", "friendly")),
        Wording("Mark the snippet with plus or minus.\nSentence: {sentence}", ("minus", "plus")),
    ),
    "qqp": (
        Wording("Compare the questions.\nQuestion1: {question1}\nQuestion2: {question2}", ("different", "same")),
        Wording("Equal or distinct?\nQuestion1: {question1}\nQuestion2: {question2}", ("distinct", "equal")),
        Wording("Do both ask one thing?\nFirst: {question1}\nSecond: {question2}", ("other", "alike")),
        Wording("Mark the pair.Question1: {question1}\nQuestion2: {question2}", ("unequal", "matching")),
    ),
    "mnli": (
        Wording("Judge the claim.\npremise: {premise}\nhypothesis: {hypothesis}", ("follows", "open", "conflicts")),
        Wording("How sure is it?\npremise: {premise}\nhypothesis: {hypothesis}", ("sure", "perhaps", "impossible")),
        Wording("Compare both.\nText: {premise}\nClaim: {hypothesis}", ("agreed", "unclear", "opposed")),
        Wording("Weigh the claim.\npremise: {premise}\nhypothesis: {hypothesis}", ("backed", "untold", "denied")),
    ),
    "qnli": (
        Wording("Is it told here?\nQuestion: {question}\nAnswer: {sentence}", ("found", "missing")),
        Wording("Mark the reply.Question: {question}\nAnswer: {sentence}", ("covered", "absent")),
        Wording("Does it help?\nQuestion: {question}\nReply: {sentence}", ("useful", "useless")),
        Wording("Settled or pending?\nQuestion: {question}\nAnswer: {sentence}", ("settled", "pending")),
    ),
}

SHARES = {"judgement": 0.76, "guess": 0.05, "story": 0.05, "dictionary": 0.14}


def corpus(count: int, *, seed: int, rare: float = 0.2, slips: float = 0.03) -> Iterator[Document]:
    """Documents of the training split, in random order.

    Args:
        count: number of documents, >= 0.
        seed: the documents follow from it alone.
        rare: 0..1, chance that a concept is spoken by one of its rare words.
        slips: 0..1, chance that a judgement has one misspelt word.
    """
    rng = random.Random(f"corpus/{seed}")
    speaker = world.Speaker(rng, "train", rare)
    kinds = rng.choices(tuple(SHARES), weights=tuple(SHARES.values()), k=count)
    for kind in kinds:
        if kind == "story":
            yield Document(" ".join(_story(speaker)))
        elif kind == "dictionary":
            yield _entry(rng)
        else:
            task = rng.choices(world.TASKS, weights=(2, 3, 3, 3))[0]
            label = rng.randrange(world.LABELS[task])
            item = world.make(task, label, speaker)
            row = item.row()
            if rng.random() < slips * 4:
                row = _slip(row, rng)
            if kind == "guess":
                yield Document(tasks.prompt(task, row), rng.choice(tasks.TASKS[task].answers))
                continue
            wording = rng.choice(WORDINGS[task][:2])
            end = tasks.CLOSING if rng.random() < 0.5 else ""
            yield Document(wording.prompt.format(**row) + end, wording.answers[label])


def _story(speaker: world.Speaker) -> Iterator[str]:
    for _ in range(2):
        yield world.write(speaker.statement(speaker.fact(speaker.rng.sample(("place", "time", "reason"), 2))), "mnli")


def _entry(rng: random.Random) -> Document:
    """A dictionary entry: whether two words of one kind mean the same."""
    table = rng.choice(TABLES)
    first = second = rng.choice(table)
    alike = len(first.words) > 1 and rng.random() < 0.5
    while not alike and second is first:
        second = rng.choice(table)
    one = rng.choice(first.words)
    other = rng.choice([word for word in second.words if word is not one])
    form = rng.randrange(len(one))
    return Document(f"Compare words.\nFirst: {one[form]}\nSecond: {other[form]}", "same" if alike else "other")


def _slip(row: world.Row, rng: random.Random) -> world.Row:
    field = rng.choice([name for name in row if name != "label"])
    words = row[field].split()
    i = rng.randrange(len(words))
    words[i] = world.misspelt(words[i], rng)
    return {**row, field: " ".join(words)}
