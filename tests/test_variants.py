"""Each variant of a step against a textbook version of it written here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import objective, variants
from fedeat.algorithm import adversarial_gradient
from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel
from fedeat.objective import sum_over_samples
from fedeat.passes import Gradient, in_memory, trained
from fedeat.perturbation import Ascent, begin, climb, pgd

Load = Callable[..., AdaptedModel]
RADIUS = 0.3


@pytest.fixture(params=["gemma2", "gpt2", "bert-classifier"])
def model(request: pytest.FixtureRequest, load: Load) -> AdaptedModel:
    model = load(request.param)
    for parameter in model.network.parameters():
        parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture
def batch(model: AdaptedModel, examples: list[Example]) -> Batch:
    return model.collate([model.encode(example) for example in examples])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def run(gradient: Gradient[Batch], model: AdaptedModel, batch: Batch) -> tuple[float, Tensor, Tensor]:
    """Loss, perturbation and the adapter's gradient, flat."""
    model.network.zero_grad(set_to_none=True)
    loss, delta = gradient(model, batch, seeded())
    assert not loss.requires_grad
    assert delta is not None
    found = [p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]
    model.network.zero_grad(set_to_none=True)
    assert not any(module.training for module in model.network.modules())
    return float(loss), delta, torch.cat(found)


def flat_gradient(model: AdaptedModel, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.adapter_parameters().values()))])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return float((got - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("start", ["zero", "random"])
def test_freelb_averages_the_gradients_at_the_ascents_points(model: AdaptedModel, batch: Batch, start: Any) -> None:
    ascent = Ascent(RADIUS, 3, start=start)
    loss, delta, gradient = run(functools.partial(variants.freelb, ascent=ascent), model, batch)
    point = begin(ascent, model.embed(batch), batch.perturbable, seeded())
    losses, gradients = [], []
    for _ in range(3):
        point = point.detach().requires_grad_(True)
        value = trained(model, batch)(point)
        losses.append(float(value.detach()))
        gradients.append(flat_gradient(model, trained(model, batch)(point.detach())))
        last = point.detach()
        point = climb(ascent, point, torch.autograd.grad(value, point)[0], batch.perturbable)
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert close(delta, last)
    assert close(gradient, sum(gradients[1:], gradients[0]) / 3)


def test_freelbs_ascent_is_pgds_since_only_directions_count(model: AdaptedModel, batch: Batch) -> None:
    # It raises the mean over tokens, PGD a sum over samples: each sample's gradient differs by a factor alone.
    _, delta, _ = run(functools.partial(variants.freelb, ascent=Ascent(RADIUS, 3, 0.2)), model, batch)
    with model.attacking():
        expected = pgd(
            lambda d: sum_over_samples(model.supervised_losses(batch, d), batch.samples),
            *(model.embed(batch), batch.perturbable, seeded()),
            radius=RADIUS,
            steps=2,
            step_size=0.2,
        )
    assert close(delta, expected, 1e-3)


def test_harvesting_the_clean_gradient_changes_nothing_but_the_passes(model: AdaptedModel, batch: Batch) -> None:
    mixed = functools.partial(objective.mixed, weight=0.7)
    plain = functools.partial(
        adversarial_gradient, perturb=functools.partial(pgd, radius=RADIUS, steps=3), objective=mixed
    )
    calls = counted(model)
    loss, delta, gradient = run(plain, model, batch)
    passes = len(calls)
    again = run(functools.partial(variants.harvested, ascent=Ascent(RADIUS, 3), weight=0.7), model, batch)
    assert (passes, len(calls) - passes) == (5, 4)
    assert again[0] == pytest.approx(loss, rel=1e-5)
    assert close(again[1], delta, 1e-3)
    assert close(again[2], gradient, 1e-3)


def counted(model: AdaptedModel) -> list[int]:
    """Grows by one with each forward pass of the base."""
    calls: list[int] = []
    model.network.get_base_model().register_forward_pre_hook(lambda *ignored: calls.append(1))
    return calls


def test_kl_trains_on_the_clean_loss_and_the_divergence(model: AdaptedModel, batch: Batch) -> None:
    perturb = functools.partial(pgd, radius=RADIUS, steps=2, start="random")
    loss, delta, gradient = run(functools.partial(variants.kl, perturb=perturb, weight=2.0), model, batch)
    clean, moved = model.supervised_logits(batch), model.supervised_logits(batch, delta)
    allowed = ~clean.isinf()
    rows = torch.arange(len(batch.targets))
    p, q = clean.softmax(-1), moved.softmax(-1)
    terms = torch.where(allowed, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0.0)
    expected = (-p[rows, batch.targets].log() + 2.0 * terms.sum(-1)).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert close(gradient, flat_gradient(model, expected))
    # The ascent raises the divergence beyond what chance does.
    with torch.no_grad():
        start = begin(Ascent(RADIUS, 2, start="random"), model.embed(batch), batch.perturbable, seeded())
        by_chance = objective.divergence(clean, model.supervised_logits(batch, start)).mean()
        assert float(objective.divergence(clean, moved).mean()) > float(by_chance)


def test_kl_refuses_answers_to_move_away_from_which_it_would_teach(load: Load, examples: list[Example]) -> None:
    model = load("gpt2")
    kl = functools.partial(variants.kl, perturb=functools.partial(pgd, radius=RADIUS, steps=1), weight=1.0)
    mixed = model.collate([model.encode(example) for example in (examples[0], replace(examples[3], away=True))])
    with pytest.raises(ValueError, match="without answers to move away from"):
        kl(model, mixed, seeded())
    kl(model, mixed.select([0]), seeded())


def test_divergence_is_zero_with_zero_gradient_where_nothing_is_perturbed() -> None:
    logits = torch.randn(3, 5)
    logits[:, 3] = float("-inf")
    moved = logits.clone().requires_grad_(True)
    found = objective.divergence(logits, moved)
    found.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, torch.zeros(3))
    assert moved.grad is not None
    torch.testing.assert_close(moved.grad, torch.zeros(3, 5))


def test_first_layers_output_is_that_of_the_whole_pass(model: AdaptedModel, batch: Batch) -> None:
    delta = 0.1 * torch.randn(model.embed(batch).shape, generator=seeded())
    with torch.no_grad():
        losses, hidden = model.from_first_layer(batch, delta)
        torch.testing.assert_close(model.first_layer(batch, delta), hidden)
        torch.testing.assert_close(losses, model.supervised_losses(batch, delta))
        assert not torch.allclose(model.first_layer(batch), hidden)
    assert hidden.shape == delta.shape


def test_yopo_with_one_inner_step_is_pgd(model: AdaptedModel, batch: Batch) -> None:
    yopo = functools.partial(variants.yopo, ascent=Ascent(RADIUS, 3), inner=1, objective=objective.adversarial)
    attack = functools.partial(pgd, radius=RADIUS, steps=3)
    plain = functools.partial(adversarial_gradient, perturb=attack, objective=objective.adversarial)
    found, expected = run(yopo, model, batch), run(plain, model, batch)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert all(close(got, wanted, 1e-3) for got, wanted in zip(found[1:], expected[1:], strict=True))


def test_yopo_is_the_same_where_layers_recompute_their_activations(
    anyone: str, load: Load, examples: list[Example]
) -> None:
    yopo = functools.partial(variants.yopo, ascent=Ascent(RADIUS, 2), inner=2, objective=objective.adversarial)
    found = []
    for checkpointing in (False, True):
        model = load(anyone, gradient_checkpointing=checkpointing)
        found.append(run(yopo, model, model.collate([model.encode(example) for example in examples])))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert all(close(got, wanted, 1e-3) for got, wanted in zip(found[1][1:], found[0][1:], strict=True))


def test_yopo_raises_the_loss_above_what_its_passes_alone_do(load: Load, examples: list[Example]) -> None:
    model = load("mistral")
    batch = model.collate([model.encode(example) for example in examples])
    step = RADIUS / 4  # too small for two steps to reach the ball's edge
    rises = []
    for inner in (1, 3):
        yopo = functools.partial(
            variants.yopo, ascent=Ascent(RADIUS, 2, step), inner=inner, objective=objective.adversarial
        )
        rises.append(run(yopo, model, batch)[0])
    with torch.no_grad():
        clean = float(trained(model, batch)(None))
    assert rises[1] > rises[0] > clean


@pytest.mark.parametrize("start", ["zero", "random"])
def test_yopo_in_parts_is_the_same_and_never_runs_more_than_a_part(
    model: AdaptedModel, batch: Batch, start: Any
) -> None:
    yopo = functools.partial(
        variants.yopo, ascent=Ascent(RADIUS, 2, start=start), inner=2, objective=objective.adversarial
    )
    expected = run(yopo, model, batch)
    sizes: list[int] = []
    model.network.get_base_model().register_forward_pre_hook(
        lambda module, args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    model.network.zero_grad(set_to_none=True)
    loss, delta, parts = in_memory(without_memory(yopo), model, batch, seeded(), 1)
    assert parts == 2
    assert max(sizes) == 2
    assert float(loss) == pytest.approx(expected[0], rel=1e-5)
    assert delta is not None
    assert close(delta, expected[1], 1e-3)
    found = [p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]
    assert close(torch.cat(found), expected[2], 1e-3)


def without_memory(gradient: Gradient[Batch]) -> Gradient[Batch]:
    """Runs out of memory for the whole batch, after it has drawn a start."""

    def found(model: Any, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        if isinstance(model, AdaptedModel):
            torch.randn(3, generator=generator)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient(model, batch, generator)

    return found


@pytest.mark.parametrize("wrong", [Ascent(1.0, 0), Ascent(1.0, 2, projection="step")])
def test_variants_that_need_directions_refuse_raw_gradients(load: Load, examples: list[Example], wrong: Ascent) -> None:
    model = load("llama")
    batch = model.collate([model.encode(example) for example in examples])
    with pytest.raises(ValueError, match="expected at least one step"):
        variants.freelb(model, batch, seeded(), ascent=wrong)
    with pytest.raises(ValueError, match="expected at least one step"):
        variants.harvested(model, batch, seeded(), ascent=wrong, weight=1.0)
    with pytest.raises(ValueError, match="expected inner >= 1"):
        variants.yopo(model, batch, seeded(), ascent=wrong, inner=0, objective=objective.adversarial)
