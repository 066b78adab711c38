"""The adaptive attacker finds the words that matter, keeps to its budget, and counts what it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fedeat.attacks.adaptive_text import asked, greedy_substitution, queries_per_success
from fedeat.attacks.neighbours import embedding_neighbours, whole_words
from fedeat.evaluation import Item, predict, tasks
from fedeat.model import AdaptedModel, ModelSource, load_model

# A model that adds up what its words weigh: above 0 is positive.
WEIGHTS = {"splendid": 3.0, "gripping": 2.0, "decent": 0.5, "plain": 0.1, "flat": -1.0, "story": 0.2, "tale": 0.2}
SUBSTITUTES = {
    "splendid": ("gripping", "decent"),
    "gripping": ("decent", "plain"),
    "decent": ("plain",),
    "story": ("tale",),
}
PRAISE = tasks.item({"sentence": "a splendid and decent story told flat", "label": 1})
WRONG = tasks.item({"sentence": "a flat story", "label": 1})


def ask(items: Sequence[Item]) -> list[torch.Tensor]:
    sums = [sum(WEIGHTS.get(word, 0.0) for text in item.texts or () for word in text.split()) for item in items]
    return [torch.tensor([0.0, value - 1.0], dtype=torch.float64).log_softmax(-1) for value in sums]


def substitutes(word: str) -> tuple[str, ...]:
    return SUBSTITUTES.get(word, ())


def test_the_word_that_matters_most_goes_first_and_the_search_stops_when_the_model_fails() -> None:
    (found,) = greedy_substitution([PRAISE], ask, substitutes)
    assert found.fell
    # splendid -> decent leaves 0.5 + 0.5 + 0.2 - 1.0 = 0.2, below the threshold of 1.
    assert found.modified.texts == ("a decent and decent story told flat",)
    assert found.queries == 1 + 3 + 2  # itself, three words left out, two substitutes
    assert found.rate == pytest.approx(1 / 7)


def test_what_was_wrong_before_is_not_attacked() -> None:
    (found,) = greedy_substitution([WRONG], ask, substitutes)
    assert (found.modified, found.fell, found.queries) == (WRONG, None, 1)


def test_texts_are_asked_about_side_by_side() -> None:
    calls: list[int] = []

    def counted(items: Sequence[Item]) -> list[torch.Tensor]:
        calls.append(len(items))
        return ask(items)

    told: list[tuple[int, int]] = []
    found = greedy_substitution([PRAISE] * 5 + [WRONG], counted, substitutes, progress=lambda *w: told.append(w))
    assert calls == [6, 15, 10]
    assert sum(calls) == sum(item.queries for item in found)
    assert told[-1] == (6, 6)


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 6, 50])
def test_no_text_costs_more_than_the_budget(budget: int) -> None:
    (found,) = greedy_substitution([PRAISE], ask, substitutes, budget=budget)
    assert found.queries <= budget
    assert bool(found.fell) == (budget >= 6)


def test_the_share_of_words_is_bounded() -> None:
    strong = tasks.item({"sentence": "splendid splendid splendid splendid " * 2, "label": 1})
    (found,) = greedy_substitution([strong], ask, substitutes, rate=0.25)
    assert not found.fell
    assert found.rate == pytest.approx(0.25)
    assert float(ask([found.modified])[0][1]) < float(ask([strong])[0][1])


def test_queries_per_success_counts_those_that_were_in_vain() -> None:
    stubborn = tasks.item({"sentence": "splendid gripping splendid gripping splendid gripping", "label": 1})
    found = greedy_substitution([PRAISE, stubborn, WRONG], ask, substitutes, rate=0.1)
    assert [item.fell for item in found] == [True, False, None]
    assert queries_per_success(found) == found[0].queries + found[1].queries
    assert queries_per_success(found[1:]) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-classifier"])
def test_neighbours_are_words_of_the_models_table(load: Callable[..., AdaptedModel], name: str) -> None:
    model = load(name)
    known = whole_words(model.tokenizer)
    assert {"film", "story"} <= known.keys()
    near = embedding_neighbours(model, count=3, similarity=-1.0)
    assert near("notaword") == ()
    found = near("film")
    assert 0 < len(found) <= 3
    assert set(found) <= known.keys() - {"film", "the", "and", "with"}
    assert list(embedding_neighbours(model, similarity=1.1)("film")) == []


def test_opposites_stop_words_and_negations_are_no_substitutes(language_model: Path) -> None:
    near = embedding_neighbours(
        load_model(ModelSource(str(language_model), max_length=128), lora=None), count=100, similarity=-1.0
    )
    found = set(near("good"))
    assert {"film", "dull", "bright"} <= found
    assert not found & {"good", "bad", "who", "was", "the"}


def test_a_real_model_is_asked_what_an_evaluation_would_ask(load: Callable[..., AdaptedModel]) -> None:
    model = load("bert-classifier")
    items = [PRAISE, WRONG]
    answers = predict(model, [tasks.example(item, model.kind) for item in items])
    scores = asked(model)(items)
    assert [int(row.argmax()) for row in scores] == answers
    assert all(float(row.exp().sum()) == pytest.approx(1) for row in scores)
