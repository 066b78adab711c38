"""A small English world whose texts have the four GLUE task shapes of the paper's evaluation (Sec. 6.1).

People do things to objects, somewhere, at some time; and people have opinions. From this come `rows` (SST-2, QQP, MNLI
and QNLI, in GLUE's own fields), `pairs` (a row and its adversarial variant of the kinds AdvGLUE has) and `corpus` (the
text a base model is pretrained on). Everything follows from a seed and the standard library alone.

Training and test texts are disjoint by construction: every (verb, object) pair and every (noun, judgement) pair of
concepts belongs to one split by their places in the tables, and each text holds pairs of one split only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedeat.demo.lexicon import (
    BLAME,
    COLOURS,
    MANNERS,
    OBJECTS,
    PARTS,
    PEOPLE,
    PLACES,
    PRAISE,
    QUESTIONS,
    REASONS,
    STATES,
    TABLES,
    THINGS,
    TIMES,
    VERBS,
    Concept,
)

Split = Literal["train", "test"]
Row = dict[str, Any]

TASKS = ("sst2", "qqp", "mnli", "qnli")
FIELDS = {
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}
LABELS = {"sst2": 2, "qqp": 2, "mnli": 3, "qnli": 2}
METHODS = ("synonym", "typo", "distraction")

RARE = 0.1  # share of concepts spoken by one of their rare words
_TEST_SHARE = 5  # one pair of concepts in five belongs to the test split


@dataclass(frozen=True)
class _Word:
    """One word of a text and, where it carries meaning, the concept and form it speaks."""

    text: str
    concept: Concept | None = None
    form: int = 0


_Text = tuple[_Word, ...]


@dataclass(frozen=True)
class _Fact:
    """Who did what to what, and the details that may be left unsaid."""

    person: Concept
    verb: Concept
    object: Concept
    state: Concept | None = None
    colour: Concept | None = None
    place: Concept | None = None
    time: Concept | None = None
    reason: Concept | None = None
    manner: Concept | None = None


_POSITION = {concept.name: i for table in TABLES for i, concept in enumerate(table)}
_DETAILS = {"colour": COLOURS, "place": PLACES, "time": TIMES, "reason": REASONS, "manner": MANNERS}
_ASKED = {"where": "place", "when": "time", "why": "reason", "how": "manner", "what colour": "colour"}
_DECISIVE = {"question", "state", "praise", "blame", *_DETAILS}


@dataclass(frozen=True)
class Speaker:
    """Draws concepts of one split and puts them into words.

    Attributes:
        rng: the only source of chance.
        split: the split whose pairs of concepts may be spoken.
        rare: chance that a concept is spoken by one of its rare words.
    """

    rng: random.Random
    split: Split
    rare: float = RARE

    def say(self, concept: Concept, form: int = 0) -> _Word:
        """The concept in its common word, or with chance `rare` in one of its rare words."""
        index = self.rng.randrange(1, len(concept.words)) if self._rarely(concept) else 0
        return _Word(concept.words[index][form], concept, form)

    def _rarely(self, concept: Concept) -> bool:
        return self.rng.random() < self.rare and len(concept.words) > 1

    def join(self, *parts: str | _Word | Sequence[_Word]) -> _Text:
        """One text of literal words, concepts and other texts."""
        words: list[_Word] = []
        for part in parts:
            if isinstance(part, str):
                words.extend(map(_Word, part.split()))
            elif isinstance(part, _Word):
                words.append(part)
            else:
                words.extend(part)
        return tuple(words)

    def fact(self, details: Sequence[str] = ()) -> _Fact:
        """A fact of this split that has the named details."""
        verb, thing = self.pair(VERBS, OBJECTS)
        told = {name: self.rng.choice(_DETAILS[name]) for name in details}
        return _Fact(self.rng.choice(PEOPLE), verb, thing, **told)

    def pair(self, first: Sequence[Concept], second: Sequence[Concept]) -> tuple[Concept, Concept]:
        """Two concepts whose pair belongs to this split."""
        while True:
            drawn = self.rng.choice(first), self.rng.choice(second)
            if _split_of(*drawn) == self.split:
                return drawn

    def statement(self, fact: _Fact) -> _Text:
        """The fact as a sentence, in one of four word orders."""
        who, did = self.say(fact.person), self.say(fact.verb, 1)
        looks = [self.say(concept) for concept in (fact.state, fact.colour) if concept]
        what = self.join("the", looks, self.say(fact.object))
        details = self.details(fact)
        self.rng.shuffle(details)
        order = self.rng.randrange(3)
        if order == 1 and details:
            return self.join(details[0], who, did, what, *details[1:], ".")
        if order == 2:
            return self.join("it was", who, "who", did, what, *details, ".")
        return self.join(who, did, what, *details, ".")

    def details(self, fact: _Fact) -> list[_Text]:
        """Words of the fact's place, time, reason and manner, as far as it has them."""
        place = [self.join("at the", self.say(fact.place))] if fact.place else []
        rest = [self.join(self.say(concept)) for concept in (fact.time, fact.reason, fact.manner) if concept]
        return place + rest

    def question(self, fact: _Fact, asked: Concept) -> _Text:
        """A question of the named kind about the fact."""
        who, what = self.say(fact.person), self.join("the", self.say(fact.object))
        do, did, details = self.say(fact.verb, 0), self.say(fact.verb, 1), self.details(fact)
        opening = self.rng.choice(("", "do you know", "can you tell me", "tell me"))
        if asked.name == "what colour":
            return self.join(opening, self.say(asked), "was", what, "that", who, did, *details, "?")
        if opening:
            return self.join(opening, self.say(asked), who, did, what, *details, "?")
        return self.join(self.say(asked), "did", who, do, what, *details, "?")

    def opinion(self, label: int) -> _Text:
        """A judgement with one or two cues, all of one sentiment: 0 negative, 1 positive."""
        mood, other = (PRAISE, BLAME) if label else (BLAME, PRAISE)
        say, rng = self.say, self.rng
        thing, cue = self.pair(THINGS, mood)
        part, second = self.pair(PARTS, mood)
        negated_part, negated = self.pair(PARTS, other)
        forms: tuple[Callable[[], _Text], ...] = (
            lambda: self.join("a", say(cue), say(thing)),
            lambda: self.join("the", say(part), "is", say(second)),
            lambda: self.join("this", say(thing), "is", say(cue), "and its", say(part), "is", say(second)),
            lambda: self.join("a", say(cue), say(thing), "with a", say(second), say(part)),
            lambda: self.join("i found the", say(part), say(second), "in a", say(cue), say(thing)),
            lambda: self.join("the", say(negated_part), "is never", say(negated)),
            lambda: self.join("a", say(cue), say(thing), "whose", say(negated_part), "is not", say(negated)),
        )
        opening = rng.choice(("", "", "frankly ,", "for me ,", "all in all ,", "to be fair ,", "once more ,"))
        closing = rng.choice(("", "", "from start to finish", "if you ask me", "by any measure", "this year"))
        return self.join(opening, rng.choice(forms)(), closing)


@dataclass(frozen=True)
class _Item:
    """A row before it is written out: its texts with their meaning, and its label."""

    task: str
    texts: tuple[_Text, ...]
    label: int

    def row(self) -> Row:
        fields = {field: write(text, self.task) for field, text in zip(FIELDS[self.task], self.texts, strict=True)}
        return {**fields, "label": self.label}


def rows(task: str, count: int, *, seed: int, split: Split = "train", rare: float = RARE) -> list[Row]:
    """Distinct rows of a task in GLUE's fields, labels in turn.

    Args:
        task: one of `TASKS`.
        count: number of rows, >= 0.
        seed: the rows follow from (task, seed, split, rare) alone.
        split: the pairs of concepts that the texts may hold.
        rare: 0..1, chance that a concept is spoken by one of its rare words.

    Raises:
        ValueError: the task or the split is unknown.
    """
    return [item.row() for item in _items(task, count, seed=seed, split=split, rare=rare)]


def pairs(task: str, count: int, *, seed: int, split: Split = "test") -> list[tuple[Row, Row, str]]:
    """Rows with their adversarial variants: (row, modified row, method), the label the same in both.

    The methods stand for AdvGLUE's: "synonym" puts rare words for common ones (as TextFooler), "typo" misspells words
    (as TextBugger), "distraction" adds words without bearing (as StressTest and CheckList). The original is in common
    words throughout.

    Raises:
        ValueError: the task or the split is unknown.
    """
    rng = random.Random(f"pairs/{task}/{seed}/{split}")
    made = []
    for item in _items(task, count, seed=seed, split=split, rare=0.0, stream="pairs"):
        method = rng.choices(METHODS, weights=(5, 4, 3))[0]
        modified = replace(item, texts=_attack(item, method, rng))
        made.append((item.row(), modified.row(), method))
    return made


def _items(task: str, count: int, *, seed: int, split: str, rare: float, stream: str = "rows") -> list[_Item]:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected train or test")
    rng = random.Random(f"{stream}/{task}/{seed}/{split}")
    speaker = Speaker(rng, "test" if split == "test" else "train", rare)
    seen: set[tuple[str, ...]] = set()
    items: list[_Item] = []
    while len(items) < count:
        item = make(task, len(items) % LABELS[task], speaker)
        texts = tuple(write(text, task) for text in item.texts)
        if texts not in seen and len(set(texts)) == len(texts):
            seen.add(texts)
            items.append(item)
    return items


def make(task: str, label: int, speaker: Speaker) -> _Item:
    return {"sst2": _sst2, "qqp": _qqp, "mnli": _mnli, "qnli": _qnli}[task](label, speaker)


def _sst2(label: int, speaker: Speaker) -> _Item:
    return _Item("sst2", (speaker.opinion(label),), label)


def _qqp(label: int, speaker: Speaker) -> _Item:
    """Label 1: the same thing is asked again in other words; 0: something else about the same fact is asked."""
    fact = speaker.fact()
    asked = other = speaker.rng.choice(QUESTIONS)
    while not label and other is asked:
        other = speaker.rng.choice(QUESTIONS)
    return _Item("qqp", (speaker.question(fact, asked), speaker.question(fact, other)), label)


def _mnli(label: int, speaker: Speaker) -> _Item:
    """Label 0: the hypothesis tells the same state; 1: one that the premise leaves open; 2: the opposite one."""
    rng = speaker.rng
    index = rng.randrange(len(STATES))
    if label == 2:
        claimed = index ^ 1
    else:
        claimed = index
        while label == 1 and claimed // 2 == index // 2:
            claimed = rng.randrange(len(STATES))
    fact = replace(speaker.fact(_some(rng, ["place", "time"], 0, 1)), state=STATES[index])
    hypothesis = replace(fact, state=STATES[claimed], place=None, time=None)
    return _Item("mnli", (speaker.statement(fact), speaker.statement(hypothesis)), label)


def _qnli(label: int, speaker: Speaker) -> _Item:
    """Label 0: the sentence tells what is asked; 1: it tells something else about the same fact."""
    rng = speaker.rng
    asked = rng.choice([concept for concept in QUESTIONS if concept.name in _ASKED])
    detail = _ASKED[asked.name]
    others = [name for name in _DETAILS if name != detail]
    fact = speaker.fact([detail, *_some(rng, others, 0, 1)] if label == 0 else _some(rng, others, 1, 2))
    question = speaker.question(_Fact(fact.person, fact.verb, fact.object), asked)
    return _Item("qnli", (question, speaker.statement(fact)), label)


def _some(rng: random.Random, names: list[str], least: int, most: int) -> list[str]:
    return rng.sample(names, rng.randint(least, most))


def _split_of(first: Concept, second: Concept) -> Split:
    return "test" if (_POSITION[first.name] + _POSITION[second.name]) % _TEST_SHARE == 0 else "train"


def write(text: _Text, task: str) -> str:
    """The text as a string: "an" before a vowel, punctuation closed up, a capital first except in reviews."""
    words = [word.text for word in text]
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][0] in "aeiou":
            words[i] = "an"
    line = " ".join(words).replace(" ?", "?").replace(" .", ".").replace(" ,", ",")
    return line if task == "sst2" or line.startswith(("@", "http")) else line[:1].upper() + line[1:]


def _attack(item: _Item, method: str, rng: random.Random) -> tuple[_Text, ...]:
    texts = [list(text) for text in item.texts]
    if method == "distraction":
        _distract(texts, rng)
        return tuple(map(tuple, texts))
    spots = [(t, i) for t, text in enumerate(texts) for i, word in enumerate(text) if word.concept is not None]
    if method == "synonym":
        spots = [(t, i) for t, i in spots if len(_concept(texts[t][i]).words) > 1]
    rng.shuffle(spots)
    spots.sort(key=lambda spot: _concept(texts[spot[0]][spot[1]]).kind not in _DECISIVE)
    for t, i in spots[: {"synonym": MOST_SYNONYMS, "typo": MOST_TYPOS}[method]]:
        word = texts[t][i]
        if method == "synonym":
            rare = rng.choice(_concept(word).words[1:])
            texts[t][i] = replace(word, text=rare[word.form])
        else:
            texts[t][i] = replace(word, text=misspelt(word.text, rng))
    return tuple(map(tuple, texts))


def _concept(word: _Word) -> Concept:
    assert word.concept is not None
    return word.concept


def misspelt(word: str, rng: random.Random) -> str:
    """The word with one slip: two letters swapped, one dropped, doubled, or replaced by one that looks like it."""
    inner = [i for i in range(1, len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha()]
    if not inner:
        return word + word[-1]
    i = rng.choice(inner)
    slips = [word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:]]
    if word[i] != word[i + 1]:
        slips.append(word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    if word[i] in _LOOKALIKES:
        slips.append(word[:i] + _LOOKALIKES[word[i]] + word[i + 1 :])
    return rng.choice(slips)


_LOOKALIKES = {"a": "@", "e": "3", "i": "1", "l": "1", "o": "0", "s": "5", "t": "7"}
MOST_SYNONYMS = 4
MOST_TYPOS = 2


def _distract(texts: list[list[_Word]], rng: random.Random) -> None:
    """Adds words without bearing: a clause behind the last text, or a handle or a link before the first."""
    if rng.random() < 0.75:
        clause = rng.choice(("and true is true", "and false is not true", "if true is true", "and not not true"))
        end = texts[-1].pop() if texts[-1][-1].text in ("?", ".") else None
        texts[-1].extend(map(_Word, clause.split()))
        if end:
            texts[-1].append(end)
    else:
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=4))
        texts[0].insert(0, _Word(rng.choice(("@" + letters, "https://t.co/" + letters))))
