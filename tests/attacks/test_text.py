"""Attacks on texts: seeded, bounded, of the kinds they say, and they leave alone what decides the label."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeat.attacks.pairs import mean_rate, pair_rows
from fedeat.attacks.text import Attacked, changeable, distractions, like, rewritten, substitutions, typos, words
from fedeat.evaluation import Item, tasks

SENTENCE = "The remarkable performance never quite redeems a positive but tedious screenplay , doesn't it ?"
ITEM = tasks.item({"sentence": SENTENCE, "label": 0})
PAIR = tasks.item({"question1": "How can I learn Spanish quickly?", "question2": "What teaches Spanish?", "label": 1})
OTHER = Item("sst2", "Is this good? great film", None, 1)
SYNONYMS = {"remarkable": ("notable", "striking"), "performance": ("acting",), "tedious": ("dull", "dreary")}


def reachable(word: str) -> tuple[str, ...]:
    return SYNONYMS.get(word, ())


def changed_words(found: Attacked) -> list[tuple[str, str]]:
    before, after = ([w for t in item.texts or () for w in t.split()] for item in (found.original, found.modified))
    assert len(before) == len(after)
    return [(a, b) for a, b in zip(before, after, strict=True) if a != b]


def test_stop_words_negations_and_answers_are_left_alone() -> None:
    found = words(ITEM)
    open_words = {found[index].letters for index in changeable(ITEM, found)}
    assert open_words == {"remarkable", "performance", "redeems", "tedious", "screenplay"} | {"quite"}


@pytest.mark.parametrize("item", [ITEM, PAIR])
def test_words_can_be_put_back_where_they_were(item: Item) -> None:
    found = words(item)
    assert rewritten(item, found, {index: word.letters for index, word in enumerate(found)}) == item


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.floats(0.05, 1.0))
def test_typos_change_one_place_of_so_many_words(seed: int, rate: float) -> None:
    (found,) = typos([ITEM], rate=rate, seed=seed)
    changed = changed_words(found)
    assert 1 <= len(changed) <= max(1, int(rate * len(words(ITEM))))
    assert found.rate == pytest.approx(len(changed) / len(words(ITEM)))
    assert found.modified.label == ITEM.label
    assert tasks.split_prompt("sst2", found.modified.prompt) == found.modified.texts
    for before, after in changed:
        assert before[0] == after[0] or found.method == "typo: homoglyph"
        kind = found.method.removeprefix("typo: ")
        assert len(after) - len(before) == {"swap": 0, "drop": -1, "insert": 1, "homoglyph": 0}[kind]
        if kind == "swap":
            assert sorted(before) == sorted(after)
        if kind == "homoglyph":
            assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
            assert not after.isascii()
    assert typos([PAIR, ITEM], rate=rate, seed=seed)[1] == found  # its neighbours do not matter


def test_every_kind_of_typo_comes_up() -> None:
    kinds = {typos([ITEM], seed=seed)[0].method for seed in range(40)}
    assert kinds == {f"typo: {name}" for name in ("swap", "drop", "insert", "homoglyph")}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_substitutions_take_what_they_are_given(seed: int) -> None:
    (found,) = substitutions([ITEM], reachable, rate=0.2, seed=seed)
    changed = changed_words(found)
    assert 1 <= len(changed) <= 2
    assert all(after in SYNONYMS[before] for before, after in changed)
    assert substitutions([ITEM], lambda word: (), seed=seed) == [Attacked(ITEM, ITEM, "substitution", 0.0)]


def test_distractions_stand_behind_the_last_text_and_leave_the_rest() -> None:
    seen = set()
    for seed in range(40):
        (found,) = distractions([PAIR], seed=seed)
        assert found.modified.texts is not None
        assert PAIR.texts is not None
        assert found.modified.texts[0] == PAIR.texts[0]
        assert found.modified.texts[1].startswith(PAIR.texts[1] + " ")
        seen.add(re.sub(r"\b[a-z0-9]{8}$", "", found.modified.texts[1][len(PAIR.texts[1]) :]))
    assert len(seen) == 5


def test_a_prompt_whose_texts_cannot_be_told_stays() -> None:
    for (found,) in (typos([OTHER]), distractions([OTHER]), substitutions([OTHER], reachable)):
        assert (found.modified, found.rate) == (OTHER, 0.0)


def test_capitals_are_kept() -> None:
    assert [like(word, "other") for word in ("Good", "good", "GOOD", "A")] == ["Other", "other", "OTHER", "Other"]


def test_pairs_are_in_the_schema_that_evaluation_reads() -> None:
    found = [*typos([ITEM, PAIR, OTHER], seed=1), *distractions([ITEM])]
    rows = pair_rows(found)
    assert [(row["task"], row["index"], row["type"]) for row in rows[:4]] == [
        ("sst2", 0, "modified"),
        ("sst2", 0, "original"),
        ("qqp", 0, "modified"),
        ("qqp", 0, "original"),
    ]
    assert len({(row["task"], row["index"], row["type"]) for row in rows}) == len(rows) == 8
    assert {"prompt", "label", "method", "data construction", "rate"} <= rows[0].keys()
    assert rows[-1]["data construction"] == "sentence"
    assert mean_rate(found) == pytest.approx(sum(f.rate for f in found if f.rate) / 3)
    assert mean_rate([]) == 0.0
