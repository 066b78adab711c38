"""Differentially private gradients: a sample moves the sum by at most the clip, and nothing else has changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import objective, perturbation
from fedeat.algorithm import LocalTraining, adversarial_gradient, client_update, gradient_of
from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel
from fedeat.privacy import private

Load = Callable[..., AdaptedModel]
CLEAN = functools.partial(adversarial_gradient, perturb=None, objective=objective.adversarial)
ATTACKED = functools.partial(
    adversarial_gradient,
    perturb=functools.partial(perturbation.pgd, radius=0.3, steps=2),
    objective=objective.adversarial,
)


@pytest.fixture
def model(load: Load) -> AdaptedModel:
    return load("bert-classifier")


@pytest.fixture
def batch(model: AdaptedModel, examples: list[Example]) -> Batch:
    return model.collate([model.encode(example) for example in examples])


def gradients(model: AdaptedModel, found: Callable[..., Any], batch: Batch, seed: int = 0) -> Tensor:
    for parameter in model.adapter_parameters().values():
        parameter.grad = None
    found(model, batch, torch.Generator().manual_seed(seed))
    return torch.cat([p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]).detach()


@pytest.mark.parametrize("gradient", [CLEAN, ATTACKED], ids=["clean", "perturbed"])
def test_without_noise_and_with_a_clip_that_no_sample_reaches_it_is_the_ordinary_gradient(
    model: AdaptedModel, batch: Batch, gradient: Any
) -> None:
    mine = private(gradient, clip=1e9, noise_multiplier=0.0, batch_size=4)
    # Each sample of a classifier has one supervised row, so that the mean over rows is the mean over samples.
    torch.testing.assert_close(gradients(model, mine, batch), gradients(model, gradient, batch), rtol=1e-3, atol=1e-5)


def test_no_sample_moves_the_sum_by_more_than_the_clip(model: AdaptedModel, batch: Batch) -> None:
    clip = 0.5 * float(torch.linalg.vector_norm(gradients(model, CLEAN, batch.select([0]))))
    mine = private(ATTACKED, clip=clip, noise_multiplier=0.0, batch_size=1)
    whole = gradients(model, mine, batch)
    for left in range(4):
        others = batch.select([sample for sample in range(4) if sample != left])
        moved = float(torch.linalg.vector_norm(whole - gradients(model, mine, others)))
        assert moved <= clip * (1 + 1e-4)
        alone = gradients(model, mine, batch.select([left]))
        assert float(torch.linalg.vector_norm(alone)) <= clip * (1 + 1e-6)


def test_the_sum_is_divided_by_the_batch_size_that_was_asked_for(model: AdaptedModel, batch: Batch) -> None:
    one, ten = (
        gradients(model, private(CLEAN, clip=1.0, noise_multiplier=0.0, batch_size=n), batch.select([1]))
        for n in (1, 10)
    )
    torch.testing.assert_close(one, 10 * ten)


def test_noise_has_its_deviation_and_follows_its_generator(model: AdaptedModel, batch: Batch) -> None:
    quiet = private(CLEAN, clip=0.1, noise_multiplier=0.0, batch_size=2)
    loud = private(CLEAN, clip=0.1, noise_multiplier=3.0, batch_size=2)
    still = gradients(model, quiet, batch)
    noise = gradients(model, loud, batch) - still
    assert float(noise.std()) == pytest.approx(0.1 * 3.0 / 2, rel=0.15)
    assert torch.equal(noise, gradients(model, loud, batch) - still)
    own = private(CLEAN, clip=0.1, noise_multiplier=3.0, batch_size=2, noise=torch.Generator().manual_seed(5))
    assert not torch.equal(gradients(model, own, batch), gradients(model, own, batch))


def test_no_sample_changes_what_is_drawn_for_others_from_a_seed_that_is_known(
    model: AdaptedModel, batch: Batch
) -> None:
    ascent = functools.partial(perturbation.pgd, radius=0.3, steps=1, start="random")
    gradient = functools.partial(adversarial_gradient, perturb=ascent, objective=objective.adversarial)
    known, fresh = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    before = known.get_state()
    private(gradient, clip=1.0, noise_multiplier=1.0, batch_size=4, noise=fresh)(model, batch, known)
    assert torch.equal(known.get_state(), before)


def test_a_sample_without_a_finite_gradient_adds_nothing(model: AdaptedModel, batch: Batch) -> None:
    def broken(model: Any, batch: Batch, generator: torch.Generator) -> Any:
        loss = CLEAN(model, batch, generator)
        for parameter in model.adapter_parameters().values():
            parameter.grad = torch.full_like(parameter, math.nan)
        return loss

    assert not bool(gradients(model, private(broken, clip=1.0, noise_multiplier=0.0, batch_size=4), batch).any())


def test_every_step_of_a_client_is_private(model: AdaptedModel, batch: Batch) -> None:
    training = LocalTraining(
        1, None, objective.adversarial, functools.partial(torch.optim.SGD, lr=1.0), max_grad_norm=None, every=2
    )
    shut = replace(training, private=functools.partial(private, clip=1e-3, noise_multiplier=0.0, batch_size=1))
    assert gradient_of(training, 0) is not gradient_of(shut, 0)
    update = client_update(
        model,
        model.adapter(),
        lambda epoch: [batch.select([0]), batch.select([1])],
        client_id=0,
        num_examples=2,
        training=shut,
        generator=torch.Generator().manual_seed(0),
    )
    assert 0 < update.metrics["update_norm"] <= 2e-3 * (1 + 1e-5)
