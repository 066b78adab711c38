"""Radii: what an attack does along a grid of them, and the one that is recommended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedeat import config as configuration
from fedeat import experiment
from fedeat.data import Batch, Example
from fedeat.errors import DataError
from fedeat.experiment.calibration import Point, calibrate, recommend
from fedeat.model import AdaptedModel, load_model


def points(accuracies: list[float], clean: float) -> list[Point]:
    return [Point(0.1 * i, 1.0, 2.0, 1.1, clean, found) for i, found in enumerate(accuracies, start=1)]


@pytest.mark.parametrize(
    ("adversarial", "clean", "chance", "expected"),
    [
        ([0.9, 0.8, 0.75, 0.7], 1.0, 0.5, 0.3),  # half of what is above chance: .75
        ([0.9, 0.7, 0.9], 1.0, 0.5, 0.1),  # a radius behind one that takes too much does not count
        ([0.74], 1.0, 0.5, None),
        ([0.4, 0.3, 0.2], 0.4, 0.5, None),  # no better than chance: nothing to lose
        ([], 1.0, 0.5, None),
    ],
)
def test_the_largest_radius_that_leaves_half_is_recommended(
    adversarial: list[float], clean: float, chance: float, expected: float | None
) -> None:
    assert recommend(points(adversarial, clean), chance=chance) == pytest.approx(expected)


@pytest.fixture
def model(make_config: Callable[..., Path]) -> AdaptedModel:
    config = configuration.load(make_config())
    return load_model(experiment.model_source(config, []), lora=None)


def test_pgd_raises_the_loss_more_than_noise_and_more_with_the_radius(model: AdaptedModel) -> None:
    words = ("good", "bad", "dull", "bright")
    encoded = [model.encode(Example(f"the film was {word} .", word)) for word in words]
    told: list[tuple[str, int, int]] = []
    found = calibrate(model, encoded, radii=(0.5, 0.1), steps=5, batch_size=2, progress=lambda *what: told.append(what))
    assert [point.radius for point in found.points] == [0.1, 0.5]
    for point in found.points:
        assert point.adversarial_loss >= point.random_loss
        assert point.adversarial_loss > point.clean_loss
        assert point.clean_loss == found.points[0].clean_loss
    assert found.points[1].adversarial_loss > found.points[0].adversarial_loss
    assert told[-1] == ("calibrate", 6, 6)
    assert found.examples == 4
    assert 0 < found.chance <= 1
    assert json.loads(json.dumps(found.record()))["points"][0]["radius"] == 0.1


def test_calibration_leaves_the_model_and_the_generators_as_they_were(model: AdaptedModel) -> None:
    encoded = [model.encode(Example("the film was good .", "good"))]
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (calibrate(model, encoded, radii=(0.2,), steps=2) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())


def test_classifier_that_ignores_its_texts_is_no_better_than_chance_on_several_tasks(
    load: Callable[..., AdaptedModel],
) -> None:
    model = load("bert-classifier")
    adapter = {name: tensor * ("classifier" not in name) for name, tensor in model.adapter().items()}
    bias = next(name for name in adapter if name.endswith("classifier.bias"))
    model.load_adapter({**adapter, bias: torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])})
    sentences = [Example(f"the film was {'good ' * i}", label=i % 2, task="sst2") for i in range(6)]
    pairs = [Example("a film", pair=f"a {'dull ' * i} film", label=i % 3, task="mnli") for i in range(6)]
    found = calibrate(model, [model.encode(example) for example in sentences + pairs], radii=(0.5,), steps=1)
    assert found.chance == found.points[0].accuracy == pytest.approx(5 / 12)
    assert found.recommended is None


def test_constant_answer_in_words_is_no_better_than_chance(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"sst2": ["good", "good", "bad"], "qqp": ["yes maybe", "yes maybe", "yes maybe", "no"]}
    texts = [Example(f"film {i}", word, task=task) for task, words in said.items() for i, word in enumerate(words)]
    encoded = [model.encode(example) for example in texts]
    constant = {word: model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("good", "yes maybe")}
    second, closing = constant["yes maybe"][1], model.tokenizer.eos_token_id

    def logits(batch: Batch, delta: Tensor | None = None) -> Tensor:
        # The most frequent answer of the task, and what follows it, whatever the text.
        binary = [model.tokenizer.decode([token]) in ("good", "bad") for token in batch.targets]
        first = torch.tensor([constant["good" if found else "yes maybe"][0] for found in binary])
        known = (batch.targets == second) | (batch.targets == closing)
        rows = torch.nn.functional.one_hot(torch.where(known, batch.targets, first), len(model.tokenizer)).float()
        return rows if delta is None else rows + 0 * delta.sum()

    monkeypatch.setattr(model, "supervised_logits", logits)
    tasks = [example.task for example in texts]
    found = calibrate(model, encoded, tasks=tasks, radii=(0.1,), steps=1)
    assert found.points[0].accuracy == found.chance == pytest.approx((2 + 3 + 3) / (3 + 4 + 3))
    assert found.recommended is None


def test_examples_without_answers_cannot_calibrate(model: AdaptedModel) -> None:
    with pytest.raises(DataError, match="no example has an answer"):
        calibrate(model, [model.encode(Example("the film was good ."))])
