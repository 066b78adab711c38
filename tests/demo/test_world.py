"""The demo's world: determinism, balance, disjoint splits, pairs that keep their label."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from fedeat import demo
from fedeat.demo import world
from fedeat.demo.corpus import WORDINGS, corpus
from fedeat.demo.lexicon import TABLES
from fedeat.evaluation import tasks


def _texts(rows: list[world.Row]) -> set[str]:
    return {value for row in rows for value in row.values() if isinstance(value, str)}


def test_no_word_stands_for_two_concepts() -> None:
    forms = Counter(form for table in TABLES for concept in table for word in concept.words for form in set(word))
    assert [form for form, count in forms.items() if count > 1] == []


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
def test_training_and_test_texts_are_disjoint(task: str) -> None:
    train = _texts(world.rows(task, 2000, seed=4, split="train"))
    originals = [row for row, _, _ in world.pairs(task, 200, seed=6)]
    assert not train & _texts(world.rows(task, 300, seed=5, split="test"))
    assert not train & _texts(originals)


def test_pretraining_text_holds_no_test_text() -> None:
    held = {text for task in world.TASKS for text in _texts(world.rows(task, 60, seed=8, split="test"))}
    documents = [document.prompt for document in corpus(2000, seed=9)]
    assert not [text for text in held if any(text in document for document in documents)]


def test_pretraining_never_answers_the_evaluations_prompts_by_their_label() -> None:
    words = {word for task in world.TASKS for word in tasks.TASKS[task].answers}
    asked = {answer for wordings in WORDINGS.values() for wording in wordings for answer in wording.answers}
    assert not words & asked


@pytest.mark.parametrize("task", world.TASKS)
def test_pairs_keep_their_label_and_change_their_text(task: str) -> None:
    made = world.pairs(task, 60, seed=7)
    assert made == world.pairs(task, 60, seed=7)
    assert {method for _, _, method in made} == set(world.METHODS)
    for original, modified, _ in made:
        assert original["label"] == modified["label"]
        assert original != modified


def test_a_slip_changes_a_word() -> None:
    rng = random.Random(0)
    assert all(world.misspelt(word, rng) != word for word in ("bicycle", "it", "where", "see") for _ in range(50))


@pytest.mark.parametrize(("task", "split"), [("rte", "train"), ("sst2", "dev")])
def test_an_unknown_task_or_split_is_refused(task: str, split: str) -> None:
    with pytest.raises(ValueError, match="unknown"):
        world.rows(task, 1, seed=0, split=split)  # type: ignore[arg-type]


def test_written_data_is_trustllms_schema(tmp_path: Path) -> None:
    data = demo.write_data(tmp_path, seed=0, train=6, test=6, pairs=4)
    assert [len(path.read_text().splitlines()) for path in (*data.train.values(), *data.test.values())] == [6] * 8
    entries = json.loads(data.pairs.read_text())
    assert len(entries) == 2 * 4 * len(world.TASKS)
    fields = {"index", "task", "prompt", "label", "method", "data construction", "type"}
    assert all(set(entry) == fields for entry in entries)
    keys = Counter((entry["task"], entry["index"], entry["label"]) for entry in entries)
    assert set(keys.values()) == {2}
