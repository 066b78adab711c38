"""Radii: what an attack does along a grid of them, and the one that is recommended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedeat import experiment
from fedeat.config import load
from fedeat.data import Example
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
    config = load(make_config())
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


def test_examples_without_answers_cannot_calibrate(model: AdaptedModel) -> None:
    with pytest.raises(DataError, match="no example has an answer"):
        calibrate(model, [model.encode(Example("the film was good ."))])
