"""A small English world that asks the four kinds of question of the paper's evaluation, as GLUE rows.

    sst2   a remark about a thing praises it or blames it
    qqp    two questions ask for the same, or the second asks about another matter
    mnli   a hypothesis follows from a premise, adds something that is not said, or denies it
    qnli   a sentence tells what a question asks for, a place, or tells something else

Each is easier than its namesake: a cue in the texts decides it, as cues decide a part of real GLUE too. Train and test
texts do not overlap: what combination of slots a text is made from decides which side it is on. An adversarial variant
keeps the label: rare synonyms, typing errors, or a distracting clause, the kinds that AdvGLUE has.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from fedeat.demo import lexicon
from fedeat.demo.lexicon import Meaning

Row: TypeAlias = dict[str, Any]
Split: TypeAlias = Literal["train", "test"]

RARE = 0.08
"""Share of a text's words that are said by a rare synonym."""


@dataclass(frozen=True)
class Word:
    """One word, or a few that stand for one.

    Attributes:
        text: as it is said.
        meaning: the synonyms it was chosen from; () for a word that an attack leaves alone.
    """

    text: str
    meaning: Meaning = ()


Text: TypeAlias = tuple[Word, ...]


@dataclass(frozen=True)
class Speaker:
    """Whose texts these are: draws from one stream, on one side of the split.

    Attributes:
        rng: the stream.
        split: which side.
        rare: 0..1, how often a rare synonym is said.
    """

    rng: random.Random
    split: Split
    rare: float = RARE

    def allowed(self, *slots: str) -> bool:
        """Whether texts made from these slots are on this side: one combination in five is a test text."""
        digest = hashlib.sha256("/".join(slots).encode()).digest()
        return (digest[0] % 5 == 0) == (self.split == "test")

    def choose(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return self.rng.choice(options)

    def say(self, template: str, **slots: str | Meaning) -> Text:
        """A template's words; a slot holds plain words, or a meaning to be said by one of its words."""
        words: list[Word] = []
        for token in template.split():
            value = slots[token[1:-1]] if token.startswith("{") else token
            if isinstance(value, tuple):
                rare = self.rng.random() < self.rare
                words.append(Word(self.choose(value[1:]) if rare else value[0], value))
            else:
                words.extend(Word(part) for part in value.split())
        return tuple(words)


@dataclass(frozen=True)
class Item:
    """One labelled example: its texts by GLUE column."""

    texts: Mapping[str, Text]
    label: int

    def row(self) -> Row:
        """As a GLUE row."""
        return {**{name: _written(text, _ENDS[name]) for name, text in self.texts.items()}, "label": self.label}


_ENDS = {"question1": "?", "question2": "?", "question": "?", "premise": ".", "hypothesis": ".", "sentence": " ."}


def _sst2(label: int, speaker: Speaker) -> Item | None:
    thing, part = speaker.choose(lexicon.THINGS), speaker.choose(lexicon.PARTS)
    first, second = speaker.rng.sample(lexicon.PRAISE if label else lexicon.BLAME, 2)
    if not speaker.allowed(thing, part, first[0]):
        return None
    template = speaker.choose(
        (
            "{a} {t} with a {b} {p}",
            "the {p} of this {t} is {a} and {b}",
            "i found the {p} {a} in a {b} {t}",
            "this {t} is {a} and its {p} is {b}",
            "a {a} {p} makes this {t} {b}",
        )
    )
    text = speaker.say(template, a=first, b=second, t=thing, p=part)
    aside = speaker.choose(("", "", "to be fair ,", "frankly ,", "all in all ,", "once more ,"))
    return Item({"sentence": (*speaker.say(aside), *text)}, label)


def _qqp(label: int, speaker: Speaker) -> Item | None:
    (verb, _), thing = speaker.choose(lexicon.VERBS), speaker.choose(lexicon.OBJECTS)
    aside = speaker.choose(("", "for my sister", "for a friend", "at home", "without tools", "before a trip"))
    if not speaker.allowed(verb, thing, aside):
        return None

    def means() -> Text:
        template = speaker.choose(
            (
                "what is the best {c} to {v} a {o} {x}",
                "is there a simple {c} to {v} a {o} {x}",
                "which {c} do you need to {v} a {o} {x}",
                "can anyone explain a {c} to {v} a {o} {x}",
            )
        )
        return speaker.say(template, c=speaker.choose(lexicon.MEANS), v=verb, o=thing, x=aside)

    def other() -> Text:
        matter = speaker.choose(sorted(lexicon.OTHER_MATTERS))
        template = speaker.choose(
            (
                "what {c} is there to {v} a {o} {x}",
                "which {c} is right to {v} a {o} {x}",
                "is there a good {c} to {v} a {o} {x}",
            )
        )
        return speaker.say(template, c=speaker.choose(lexicon.OTHER_MATTERS[matter]), v=verb, o=thing, x=aside)

    return Item({"question1": means(), "question2": means() if label else other()}, label)


def _mnli(label: int, speaker: Speaker) -> Item | None:
    name, thing, place = (speaker.choose(table) for table in (lexicon.PEOPLE, lexicon.OBJECTS, lexicon.PLACES))
    _, past = speaker.choose(lexicon.VERBS)
    if not speaker.allowed(name, thing, past):
        return None
    premise = speaker.choose(
        ("at the {p} {n} {v} the {o}", "{n} {v} the {o} at the {p}", "the {o} was {v} by {n} at the {p}")
    )
    hypothesis = speaker.choose(
        (
            ("{n} {v} the {o}", "the {o} was {v} by {n}", "it was {n} who {v} the {o}"),
            ("{n} {v} the {o} {g}", "the {o} was {v} by {n} {g}", "{g} {n} {v} the {o}"),
            ("{n} {d} {v} the {o}", "the {o} was {d} {v} by {n}", "{d} was the {o} {v} by {n}"),
        )[label]
    )
    slots = {"n": name, "o": thing, "p": place, "v": past}
    extra = {"g": speaker.choose(lexicon.GUESSES), "d": speaker.choose(lexicon.DENIALS)}
    texts = {"premise": speaker.say(premise, **slots), "hypothesis": speaker.say(hypothesis, **slots, **extra)}
    return Item(texts, label)


def _qnli(label: int, speaker: Speaker) -> Item | None:
    name, thing = speaker.choose(lexicon.PEOPLE), speaker.choose(lexicon.OBJECTS)
    _, past = speaker.choose(lexicon.VERBS)
    if not speaker.allowed(thing, past):
        return None
    # GLUE's order: label 0 is entailment, the sentence answers.
    adjuncts = [f"at the {speaker.choose(lexicon.PLACES)}"] * (label == 0)
    adjuncts += [speaker.choose(lexicon.TIMES)] * (label == 1 or speaker.rng.random() < 0.5)
    speaker.rng.shuffle(adjuncts)
    sentence = speaker.say(
        "{n} {v} the {c} {o} {x}",
        n=name,
        v=past,
        c=speaker.choose(("", *lexicon.COLOURS)),
        o=thing,
        x=" ".join(adjuncts),
    )
    question = speaker.choose(
        ("where was the {o} {v}", "in which place was the {o} {v}", "where did {n} have the {o} {v}")
    )
    return Item({"question": speaker.say(question, n=name, v=past, o=thing), "sentence": sentence}, label)


_MAKERS: Mapping[str, Callable[[int, Speaker], Item | None]] = {
    "sst2": _sst2,
    "qqp": _qqp,
    "mnli": _mnli,
    "qnli": _qnli,
}
LABELS: Mapping[str, int] = {"sst2": 2, "qqp": 2, "mnli": 3, "qnli": 2}
"""Task -> how many labels it has, in the paper's order of tasks."""
TASKS = tuple(LABELS)


def make(task: str, label: int, speaker: Speaker) -> Item:
    """One example of a task with a label."""
    while True:
        item = _MAKERS[task](label, speaker)
        if item is not None:
            return item


def rows(task: str, count: int, *, seed: int, split: Split = "train", rare: float = RARE) -> list[Row]:
    """`count` distinct GLUE rows, labels in turn, so that each is as frequent as the others.

    Args:
        task: one of `TASKS`.
        count: >= 0; some thousands a task are there.
        seed: of the draws.
        split: "train" or "test"; no text is on both sides.
        rare: 0..1, share of words said by a rare synonym.
    """
    return [item.row() for item in _items(task, count, seed=seed, split=split, rare=rare)]


def pairs(task: str, count: int, *, seed: int) -> list[tuple[Row, Row, str]]:
    """`count` test rows, each with an adversarial variant of the same label and the name of the attack.

    The attacks take turns: "synonym", "typo" (word level) and "distraction" (sentence level). A text in which no word
    has a synonym gets a typing error instead.
    """
    made = []
    for index, item in enumerate(_items(task, count, seed=seed, split="test", rare=0.0)):
        method = ATTACKS[(index // LABELS[task]) % len(ATTACKS)]
        if method == "synonym" and not any(word.meaning for text in item.texts.values() for word in text):
            method = "typo"
        rng = random.Random(f"{seed}/{task}/attack/{index}")
        made.append((item.row(), attack(item, method, rng).row(), method))
    return made


ATTACKS = ("synonym", "typo", "distraction")


def attack(item: Item, method: str, rng: random.Random) -> Item:
    """An adversarial variant of an example that keeps its label.

    Args:
        item: the original.
        method: one of `ATTACKS`.
        rng: where it strikes.
    """
    texts = dict(item.texts)
    if method == "distraction":
        name = rng.choice(sorted(texts))
        texts[name] = (*texts[name], *(Word(part) for part in rng.choice(lexicon.DISTRACTIONS).split()))
        return replace(item, texts=texts)
    strike = _rare_synonym if method == "synonym" else _misspelt
    struck = {name: tuple(strike(word, rng) if word.meaning else word for word in text) for name, text in texts.items()}
    if struck == texts:  # a text without cues: its longest word is misspelt
        name = max(sorted(texts), key=lambda key: max(len(word.text) for word in texts[key]))
        longest = max(texts[name], key=lambda word: len(word.text))
        struck[name] = tuple(_misspelt(word, rng) if word == longest else word for word in texts[name])
    return replace(item, texts=struck)


def misspelt(word: str, rng: random.Random) -> str:
    """A typing error inside a word: two letters swapped, one dropped, doubled, or replaced by a digit like it."""
    letters = [i for i, letter in enumerate(word) if letter.isalpha() and i > 0]
    if len(letters) < 2:
        return word + word[-1]
    at = rng.choice(letters)
    kind = rng.choice(("swap", "drop", "double", "lookalike"))
    if kind == "swap" and at + 1 < len(word) and word[at + 1].isalpha() and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "lookalike" and word[at] in _LOOKALIKES:
        return word[:at] + _LOOKALIKES[word[at]] + word[at + 1 :]
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    return word[: at + 1] + word[at:]


_LOOKALIKES = {"o": "0", "l": "1", "i": "1", "e": "3", "a": "4", "s": "5"}


def _rare_synonym(word: Word, rng: random.Random) -> Word:
    return replace(word, text=rng.choice([other for other in word.meaning[1:] if other != word.text]))


def _misspelt(word: Word, rng: random.Random) -> Word:
    *before, last = word.text.split()
    return replace(word, text=" ".join([*before, misspelt(last, rng)]))


def _items(task: str, count: int, *, seed: int, split: Split, rare: float) -> list[Item]:
    speaker = Speaker(random.Random(f"{seed}/{task}/{split}"), split, rare)
    seen: set[tuple[Text, ...]] = set()
    items: list[Item] = []
    while len(items) < count:
        item = make(task, len(items) % LABELS[task], speaker)
        if (key := tuple(item.texts.values())) not in seen:
            seen.add(key)
            items.append(item)
    return items


def _written(text: Text, end: str) -> str:
    joined = " ".join(word.text for word in text).replace(" ,", ",")
    return re.sub(r"\ba (?=[aeiou])", "an ", joined) + end
