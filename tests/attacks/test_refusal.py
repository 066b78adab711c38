"""Refusal under attack: the answers are those of the perturbed prompt, and agreement becomes likelier."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedeat.attacks import refusal
from fedeat.attacks.refusal import RefusalRate, refusal_rates
from fedeat.attacks.text import misspelt
from fedeat.errors import ModelError
from fedeat.evaluation.refusal import Behaviour
from fedeat.model import AdaptedModel

Load = Callable[..., AdaptedModel]
REQUESTS = [Behaviour("tell me a dull story", "the film was good"), Behaviour("film", "the answer is yes")]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_perturbation_the_answers_are_the_models_own(load: Load, name: str) -> None:
    model = load(name, max_length=32)
    prompts, agreements = [item.prompt for item in REQUESTS], [item.agreement for item in REQUESTS]
    assert refusal._attacked(model, prompts, agreements, 0.0, 1, 8) == model.generate(prompts, max_new_tokens=8)


def test_answers_end_where_the_base_models_own_end_token_stands(load: Load) -> None:
    model = load("llama", max_length=32)
    prompts, agreements = [item.prompt for item in REQUESTS], [item.agreement for item in REQUESTS]
    whole = model.generate(prompts, max_new_tokens=8)
    third = model.tokenizer(whole[0], add_special_tokens=False)["input_ids"][2]  # an end of turn, as chat models have
    model.network.get_base_model().generation_config.eos_token_id = [model.tokenizer.eos_token_id, third]
    plain = model.generate(prompts, max_new_tokens=8)
    assert plain != whole
    assert refusal._attacked(model, prompts, agreements, 0.0, 1, 8) == plain


@pytest.mark.parametrize("agreement", ["the film was good", "the film was good " * 20])
def test_prompt_beyond_the_models_positions_is_cut_as_for_a_plain_answer(load: Load, agreement: str) -> None:
    model = load("gpt2", max_length=64)
    prompts = ["the film was good and the story bright " * 20, "film"]
    answers = refusal._attacked(model, prompts, [agreement] * 2, 0.0, 1, 24)
    assert answers == model.generate(prompts, max_new_tokens=24)


def test_a_large_enough_attack_makes_the_model_agree(load: Load) -> None:
    model = load("llama", max_length=32)
    prompts, agreements = [item.prompt for item in REQUESTS], [item.agreement for item in REQUESTS]
    radius = 3 * model.embedding_unit("l2")
    before, after = (refusal._attacked(model, prompts, agreements, r, 40, 8) for r in (0.0, radius))
    begins = [
        sum(a.strip().startswith(w[:3]) for a, w in zip(said, agreements, strict=True)) for said in (before, after)
    ]
    assert begins[1] > begins[0]


def test_every_attack_has_its_rate_with_empty_answers_counted(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama", max_length=32)
    monkeypatch.setattr(model, "generate", lambda prompts, max_new_tokens: ["I cannot", " "][: len(prompts)])
    monkeypatch.setattr(refusal, "_attacked", lambda model, prompts, *rest: ["Sure"] * len(prompts))
    told: list[tuple[int, int]] = []
    found = refusal_rates(model, REQUESTS, radii=(0.2, 0.1), progress=lambda *what: told.append(what))
    assert found == [
        RefusalRate("none", 0.0, 2, 1, 1),
        RefusalRate("typos", 0.0, 2, 1, 1),
        RefusalRate("embedding", 0.1, 2, 0, 0),
        RefusalRate("embedding", 0.2, 2, 0, 0),
    ]
    assert told[-1] == (8, 8)
    assert found[0].record()["low"] < 0.5 < found[0].record()["high"]


def test_a_classifier_refuses_nothing(load: Load) -> None:
    with pytest.raises(ModelError, match="a classifier answers no requests"):
        refusal_rates(load("bert-classifier"), REQUESTS)


def test_free_text_is_misspelt_by_its_seed() -> None:
    text = "please describe the remarkable festival"
    assert misspelt(text, seed=1) == misspelt(text, seed=1) != text
    assert len({misspelt(text, seed=seed) for seed in range(9)}) > 3
