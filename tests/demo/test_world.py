"""The demo's world: determinism, balance, disjoint splits, pairs that keep their label."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest

from fedeat.demo import lexicon, world
from fedeat.demo.corpus import WORDINGS, corpus
from fedeat.evaluation import tasks


def texts(rows: list[world.Row]) -> set[str]:
    return {value for row in rows for value in row.values() if isinstance(value, str)}


def meanings() -> list[lexicon.Meaning]:
    matters = [entry for entries in lexicon.OTHER_MATTERS.values() for entry in entries]
    return [*lexicon.PRAISE, *lexicon.BLAME, *lexicon.MEANS, *matters, *lexicon.DENIALS, *lexicon.GUESSES]


def test_no_word_stands_for_two_meanings() -> None:
    counts = Counter(word for meaning in meanings() for word in meaning)
    assert [word for word, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("task", world.TASKS)
def test_rows_follow_from_the_seed_and_have_glue_fields(task: str) -> None:
    rows = world.rows(task, 30, seed=1)
    assert rows == world.rows(task, 30, seed=1) != world.rows(task, 30, seed=2)
    assert all(set(row) == {*tasks.TASKS[task].fields, "label"} for row in rows)


@pytest.mark.parametrize("task", world.TASKS)
def test_labels_are_balanced(task: str) -> None:
    labels = world.LABELS[task]
    counts = Counter(row["label"] for row in world.rows(task, 20 * labels, seed=3))
    assert counts == dict.fromkeys(range(labels), 20)
    assert labels == len(tasks.TASKS[task].answers)


@pytest.mark.parametrize("task", world.TASKS)
def test_no_text_is_in_both_splits(task: str) -> None:
    train = texts(world.rows(task, 2000, seed=4))
    assert not train & texts(world.rows(task, 300, seed=5, split="test"))
    assert not train & texts([original for original, _, _ in world.pairs(task, 200, seed=6)])


@pytest.mark.parametrize("task", world.TASKS)
def test_a_pair_changes_a_text_and_keeps_the_label(task: str) -> None:
    pairs = world.pairs(task, 60, seed=7)
    assert pairs == world.pairs(task, 60, seed=7)
    assert all(original["label"] == modified["label"] for original, modified, _ in pairs)
    assert all(original != modified for original, modified, _ in pairs)
    assert {method for _, _, method in pairs} <= set(world.ATTACKS)
    assert len({method for _, _, method in pairs}) >= 2


def test_a_synonym_is_another_word_of_the_same_meaning() -> None:
    speaker = world.Speaker(random.Random(0), "test", 0.0)
    item = world.make("sst2", 1, speaker)
    struck = world.attack(item, "synonym", random.Random(1))
    changed = [
        (old, new) for old, new in zip(item.texts["sentence"], struck.texts["sentence"], strict=True) if old != new
    ]
    assert len(changed) == 2
    assert all(new.text in old.meaning[1:] for old, new in changed)


@pytest.mark.parametrize("word", ["good", "wonderful", "on", "a"])
def test_a_misspelt_word_is_another_word_of_about_the_same_length(word: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        wrong = world.misspelt(word, rng)
        assert wrong != word
        assert abs(len(wrong) - len(word)) <= 1


def test_the_base_never_reads_a_test_text_nor_an_answer_of_the_evaluation() -> None:
    documents = list(islice(corpus(seed=9), 2000))
    held = {text for task in world.TASKS for text in texts(world.rows(task, 60, seed=8, split="test"))}
    assert not [text for text in held if any(text in document.prompt for document in documents)]
    words = {word for task in world.TASKS for word in tasks.TASKS[task].answers}
    assert not words & {answer for wordings in WORDINGS.values() for _, answers in wordings for answer in answers}
    assert not words & {document.answer for document in documents}
