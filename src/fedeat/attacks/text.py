"""Black-box attacks on texts that keep the label: typing errors, substituted words, distracting clauses.

These are the kinds that AdvGLUE has, made anew from benign texts and seeded: a model that was tuned on the published
ones has not seen them. What knows the model and adapts to it is in `adaptive_text`.

A label-preserving change of a text cannot be proved by a program. The rules that keep it likely: stop words,
negations, numbers and the words that answer the task are left alone, a typing error changes one place of a word of four
letters or more, and a share of the words is changed that `rate` bounds. Read some pairs before you trust many.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fedeat import seeding
from fedeat.evaluation import tasks
from fedeat.evaluation.tasks import Item

Substitutes: TypeAlias = Callable[[str], Sequence[str]]
"""A word in lower case -> words that may stand in its place, nearest first."""

Change: TypeAlias = Callable[[str, torch.Generator], str]
"""A word and where chance comes from -> the word changed, or as it was where it cannot be."""

_NEGATIONS = "no not nor never none nobody nothing neither nowhere without cannot hardly barely"
_STOP_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between
both but by can could did do does doing down during each either else every few for from further had has have having
he her here hers herself him himself his how i if in into is it its itself just less let like many may me might
more most much must my myself of off on once one only or other our ours out over own per rather same shall she
should since so some such than that the their theirs them then there these they this those though through to too
two under until up upon us very was we were what when where whether which while who whom whose why will with within
would yet you your yours"""
NEGATIONS = frozenset(_NEGATIONS.split())
STOP_WORDS = frozenset(_STOP_WORDS.split())

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_HOMOGLYPHS = {"a": "\u0430", "c": "\u0441", "e": "\u0435", "i": "\u0456", "o": "\u043e", "p": "\u0440", "x": "\u0445"}
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_DISTRACTIONS = (
    "and true is true",
    "and false is not true",
    "and true is true and true is true and true is true",
    "https://t.co/{handle}",
    "@{handle}",
)


@dataclass(frozen=True)
class Word:
    """A word of an item's texts: which text it is in, and where: `texts[text][start:stop]`."""

    text: int
    start: int
    stop: int
    letters: str


@dataclass(frozen=True)
class Attacked:
    """A text under attack.

    Attributes:
        original: before it.
        modified: after it, with the same label; the original where nothing could be changed.
        method: what was done, such as "typo: swap".
        rate: share of the words that were changed, or added, in 0..1.
        queries: how often the model was asked; 0 for an attack that does not know it.
        fell: whether the model was right before and wrong after; None where the attack does not know.
    """

    original: Item
    modified: Item
    method: str
    rate: float
    queries: int = 0
    fell: bool | None = None


def words(item: Item) -> list[Word]:
    """The words of an item's texts, in order; none where its texts cannot be told from its prompt."""
    return [
        Word(number, found.start(), found.end(), found.group())
        for number, text in enumerate(item.texts or ())
        for found in _WORD.finditer(text)
    ]


def changeable(item: Item, found: Sequence[Word]) -> list[int]:
    """Indices of the words that may change: no stop word, no negation, no answer of the task, three letters or more."""
    kept = STOP_WORDS | NEGATIONS | {answer.lower() for answer in tasks.named(item.task).answers}
    return [
        index
        for index, word in enumerate(found)
        if len(word.letters) > 2 and word.letters.lower() not in kept and not word.letters.lower().endswith("n't")
    ]


def rewritten(item: Item, found: Sequence[Word], changes: Mapping[int, str]) -> Item:
    """The item with some of its words replaced.

    Args:
        item: whose texts are known.
        found: its `words`.
        changes: index of a word -> what stands in its place; "" removes it.
    """
    texts = list(item.texts or ())
    for index in sorted(changes, reverse=True):
        word = found[index]
        text = texts[word.text]
        texts[word.text] = text[: word.start] + changes[index] + text[word.stop :]
    return Item(item.task, tasks.worded(item.task, texts), tuple(texts), item.label)


def typos(items: Sequence[Item], *, rate: float = 0.15, seed: int = 0) -> list[Attacked]:
    """Typing errors, one a word: two letters swapped, one dropped, one inserted, or one that only looks the same.

    Args:
        items: whose texts are known; others are returned as they are.
        rate: 0 < rate <= 1, share of the words at most; at least one is tried.
        seed: of words and errors; an item's do not depend on its neighbours.
    """
    errors: Mapping[str, Change] = {"swap": _swap, "drop": _drop, "insert": _insert, "homoglyph": _homoglyph}

    def attack(item: Item, generator: torch.Generator) -> Attacked:
        name = list(errors)[_draw(len(errors), generator)]
        return _word_by_word(item, errors[name], generator, rate=rate, method=f"typo: {name}")

    return [attack(item, _stream(seed, "typos", item)) for item in items]


def misspelt(text: str, *, rate: float = 0.15, seed: int = 0) -> str:
    """Free text with typing errors, as `typos` makes them."""
    (found,) = typos([Item("sst2", text, (text,), 0)], rate=rate, seed=seed)
    return (found.modified.texts or (text,))[0]


def substitutions(
    items: Sequence[Item], substitutes: Substitutes, *, rate: float = 0.15, seed: int = 0
) -> list[Attacked]:
    """Words replaced by near ones, drawn at random.

    Args:
        items: whose texts are known; others are returned as they are.
        substitutes: for example `neighbours.embedding_neighbours(model)`.
        rate: 0 < rate <= 1, share of the words at most; at least one is tried.
        seed: of words and substitutes.
    """

    def change(word: str, generator: torch.Generator) -> str:
        found = substitutes(word.lower())
        return like(word, found[_draw(len(found), generator)]) if found else word

    return [
        _word_by_word(item, change, _stream(seed, "substitution", item), rate=rate, method="substitution")
        for item in items
    ]


def distractions(items: Sequence[Item], *, seed: int = 0) -> list[Attacked]:
    """A clause that says nothing behind the last text, as CheckList and StressTest have them.

    Args:
        items: whose texts are known; others are returned as they are.
        seed: of the clauses.
    """

    def attack(item: Item, generator: torch.Generator) -> Attacked:
        if not item.texts:
            return Attacked(item, item, "distraction", 0.0)
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        handle = "".join(letters[_draw(len(letters), generator)] for _ in range(8))
        clause = _DISTRACTIONS[_draw(len(_DISTRACTIONS), generator)].format(handle=handle)
        texts = (*item.texts[:-1], f"{item.texts[-1].rstrip()} {clause}")
        modified = Item(item.task, tasks.worded(item.task, texts), texts, item.label)
        count = len(clause.split())
        return Attacked(item, modified, "distraction", count / (count + max(len(words(item)), 1)))

    return [attack(item, _stream(seed, "distraction", item)) for item in items]


def like(word: str, other: str) -> str:
    """`other` with the capitals of `word`."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _word_by_word(item: Item, change: Change, generator: torch.Generator, *, rate: float, method: str) -> Attacked:
    found = words(item)
    open_words = changeable(item, found)
    budget = max(1, int(rate * len(found)))
    order = torch.randperm(len(open_words), generator=generator).tolist()
    changes: dict[int, str] = {}
    for index in (open_words[place] for place in order):
        if len(changes) == budget:
            break
        changed = change(found[index].letters, generator)
        if changed != found[index].letters:
            changes[index] = changed
    if not changes:
        return Attacked(item, item, method, 0.0)
    return Attacked(item, rewritten(item, found, changes), method, len(changes) / len(found))


def _swap(word: str, generator: torch.Generator) -> str:
    """Two neighbouring letters inside the word change places; the first letter stays, as readers go by it."""
    places = [i for i in range(1, len(word) - 1) if word[i] != word[i + 1]] if len(word) > 3 else []
    if not places:
        return word
    i = places[_draw(len(places), generator)]
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _drop(word: str, generator: torch.Generator) -> str:
    if len(word) < 4:
        return word
    i = 1 + _draw(len(word) - 2, generator)
    return word[:i] + word[i + 1 :]


def _insert(word: str, generator: torch.Generator) -> str:
    """A letter that lies beside the one typed on a keyboard."""
    if len(word) < 4:
        return word
    i = 1 + _draw(len(word) - 2, generator)
    row = next((keys for keys in _KEYS if word[i].lower() in keys), None)
    if row is None:
        return word
    place = row.index(word[i].lower())
    beside = [row[k] for k in (place - 1, place + 1) if 0 <= k < len(row)]
    return word[:i] + beside[_draw(len(beside), generator)] + word[i:]


def _homoglyph(word: str, generator: torch.Generator) -> str:
    """A letter of another alphabet that looks the same."""
    places = [i for i, letter in enumerate(word) if letter in _HOMOGLYPHS] if len(word) > 3 else []
    if not places:
        return word
    i = places[_draw(len(places), generator)]
    return word[:i] + _HOMOGLYPHS[word[i]] + word[i + 1 :]


def _stream(seed: int, name: str, item: Item) -> torch.Generator:
    return seeding.generator(seed, name, item.task, item.prompt)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
