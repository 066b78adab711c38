from __future__ import annotations

from typing import Any

import pytest

from fedeat.data import Example
from fedeat.errors import ModelError
from fedeat.evaluation import EvaluationSet, Item, Pair, evaluate, shown
from fedeat.evaluation.scoring import asked
from fedeat.evaluation.shown import Shown
from fedeat.evaluation.tasks import example, item
from fedeat.model import AdaptedModel


def sentence(text: str, label: int = 1) -> Item:
    return item({"sentence": text, "label": label}, "sst2")


def pair(index: int, original: str, modified: str) -> Pair:
    return Pair("sst2", index, sentence(original), sentence(modified), 1, "m", f"g{index}")


def files(*, same: int, told: int) -> list[EvaluationSet]:
    """Pairs that differ in the middle of a long text, which cutting takes, and others that differ in a short one."""
    around = ["film " * 60 + "{}" + " story" * (60 + i) for i in range(same)]
    long = [pair(i, text.format("good"), text.format("bad")) for i, text in enumerate(around)]
    short = [pair(same + i, f"good {'? ' * i}", f"bad {'? ' * i}") for i in range(told)]
    return [EvaluationSet("pairs", pairs=(*long, *short))]


@pytest.mark.parametrize("scorer", ["likelihood", "generation"])
def test_pairs_that_cutting_makes_the_same_are_counted_and_flagged(make_model: Any, scorer: Any) -> None:
    sets = files(same=3, told=5)
    narrow, wide = make_model(max_length=64), make_model(max_length=400)
    assert shown(narrow, sets, scorer=scorer) == [Shown("sst2", texts=16, cut=6, pairs=8, same=3)]
    assert shown(wide, sets, scorer=scorer) == [Shown("sst2", texts=16, cut=0, pairs=8, same=0)]
    (row,), predictions = evaluate(narrow, sets, scorer=scorer)
    assert (row["cut"], row["same"]) == (6, 3)
    assert "identical pairs: 3 of 8 are the same tokens on both sides" in row["flags"]
    judged = predictions["sst2"]["pairs"]
    assert [found.get("same", False) for found in judged] == [True] * 3 + [False] * 5
    assert all(found["original"] == found["modified"] for found in judged[:3])
    (row,), _ = evaluate(wide, sets, scorer=scorer)
    assert (row["cut"], row["same"]) == (0, 0)
    assert not any(flag.startswith("identical") for flag in row["flags"])


def test_a_pair_that_an_attack_left_as_it_was_is_not_lost(word_model: AdaptedModel) -> None:
    sets = [EvaluationSet("pairs", pairs=(pair(0, "a good film", "a good film"), pair(1, "a bad film", "a good film")))]
    assert shown(word_model, sets) == [Shown("sst2", texts=4, cut=0, pairs=2, same=0)]
    (row,), _ = evaluate(word_model, sets)
    assert row["same"] == 0


def test_a_classifier_s_texts_are_counted_as_it_is_shown_them(classifier: AdaptedModel) -> None:
    classifier.max_length = 20
    # Cut at its end: a text loses what is behind its first tokens.
    texts = [("film " * 30 + "good", "film " * 30 + "bad"), ("good film", "bad film")]
    sets = [EvaluationSet("pairs", pairs=tuple(pair(i, *sides) for i, sides in enumerate(texts)))]
    assert shown(classifier, sets) == [Shown("sst2", texts=4, cut=2, pairs=2, same=1)]


def test_what_is_shown_is_what_answers_follow(word_model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    word_model.max_length = 64
    items = [sentence("film " * n) for n in (1, 40, 60)]
    examples = [example(entry, "causal-lm") for entry in items]
    seen: list[tuple[int, ...]] = []
    collate = word_model.collate

    def watched(encoded: Any) -> Any:
        seen.extend(entry.input_ids[: entry.answer_start] for entry in encoded)
        return collate(encoded)

    monkeypatch.setattr(word_model, "collate", watched)
    evaluate(word_model, [EvaluationSet("f", benign=tuple(items))])
    found = asked(word_model, examples)
    assert sorted(entry.input_ids for entry in found) == sorted(seen)
    assert [entry.cut for entry in found] == ["", "prompt", "prompt"]


@pytest.mark.parametrize("kind", ["causal-lm", "sequence-classification"])
def test_what_is_shown_and_what_answers_follow_are_tokenised_once(
    kind: str, make_model: Any, classifier: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model() if kind == "causal-lm" else classifier
    read: list[Example] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda entry: (read.append(entry), encode(entry))[1])
    items = [sentence("film " * n) for n in range(1, 6)]
    evaluate(model, [EvaluationSet("f", benign=tuple(items))])
    beyond_the_first = [example(entry, model.kind).prompt for entry in items[1:]]  # which shows each answer's tokens
    assert [sum(entry.prompt == prompt for entry in read) for prompt in beyond_the_first] == [1] * 4


def test_answers_that_do_not_fit_are_told_without_answering(make_model: Any, letters: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="does not fit into 6 tokens"):
        shown(make_model(letters, max_length=6), [EvaluationSet("f", benign=(sentence("a film"),))])


def test_a_note_says_what_is_lost_and_what_to_do() -> None:
    assert Shown("qqp", texts=10, cut=0, pairs=5, same=0).note(64) == ""
    assert Shown("qqp", texts=10, cut=4, pairs=0, same=0).note(64) == (
        "qqp: 4 of 10 evaluation texts do not fit into 64 tokens and are cut. Raise data.max_length, or --max-length."
    )
    known = Shown("qqp", texts=10, cut=0, pairs=5, same=1)
    assert known.note(64) == "qqp: 1 of 5 pairs are the same tokens on both sides, which counts as not broken."
    assert known.is_vacuous
    assert not Shown("qqp", texts=200, cut=0, pairs=100, same=5).is_vacuous
