"""A batch in parts, when memory runs out, and a share of it perturbed: the same results as the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import objective, perturbation
from fedeat.algorithm import LocalTraining, adversarial_gradient, client_update
from fedeat.data import Batch, Example
from fedeat.model import AdaptedModel
from fedeat.passes import InParts, attacked, in_memory, on_share
from fedeat.updates import ClientUpdate, norm

Load = Callable[..., AdaptedModel]


def batch_of(model: AdaptedModel, examples: list[Example]) -> Batch:
    return model.collate([model.encode(example) for example in examples])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", ["gemma2", "bert-classifier"])
def test_parts_have_the_losses_and_gradients_of_the_whole(
    name: str, load: Load, examples: list[Example], parts: int
) -> None:
    model = load(name, gradient_checkpointing=parts == 4)
    batch = batch_of(model, examples)
    delta = 0.1 * torch.randn(model.embed(batch).shape, generator=seeded()) * batch.perturbable.unsqueeze(-1)
    found = []
    for runner in (model, InParts(model, parts)):
        point = delta.clone().requires_grad_(True)
        with model.training():
            losses = runner.supervised_losses(batch, point)
            torch.autograd.backward(batch.mean(losses))
        gradients = [p.grad.flatten() for p in model.adapter_parameters().values() if p.grad is not None]
        assert point.grad is not None
        found.append((losses.detach(), torch.cat(gradients), point.grad))
        model.network.zero_grad(set_to_none=True)
    for whole, pieces in zip(*found, strict=True):
        assert float((whole - pieces).norm()) < 2e-5 * float(whole.norm())


def test_selected_samples_keep_their_rows(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone)
    batch = batch_of(model, examples)
    part = batch.select([2, 0])
    with model.evaluating():
        whole, some = model.supervised_losses(batch), model.supervised_losses(part)
    expected = torch.cat([whole[batch.samples == 2], whole[batch.samples == 0]])
    torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-5)
    assert part.input_ids.shape == (2, batch.input_ids.shape[1])


class Small:
    """A model that runs out of memory with more than `room` samples, after it has begun to leave gradients."""

    def __init__(self, model: AdaptedModel, room: int) -> None:
        self.model, self.room, self.asked = model, room, [0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def supervised_losses(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        self.asked.append(len(batch.input_ids))
        if len(batch.input_ids) > self.room:
            for parameter in self.model.adapter_parameters().values():
                parameter.grad = torch.ones_like(parameter)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model.supervised_losses(batch, delta)


def train(model: Any, adapter: Any, batches: list[Batch], **changes: Any) -> ClientUpdate:
    settings = LocalTraining(
        1,
        perturb=functools.partial(perturbation.pgd, radius=0.3, steps=2, start="random"),
        objective=objective.adversarial,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    )
    return client_update(
        model,
        adapter,
        lambda epoch: batches,
        client_id=0,
        num_examples=4,
        training=replace(settings, **changes),
        generator=seeded(),
    )


def test_client_out_of_memory_trains_as_one_with_enough(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    for parameter in model.network.parameters():
        parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
    start, batches = model.adapter(), [batch_of(model, examples), batch_of(model, examples[:3])]
    expected = train(model, start, batches)
    small = Small(model, room=1)
    got = train(small, start, batches)
    assert max(small.asked) == 4
    assert norm({k: got.delta[k] - expected.delta[k] for k in start}) < 1e-4 * norm(expected.delta)
    assert got.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    # What sufficed for one batch is where the next begins.
    assert small.asked.count(4) == 1
    assert small.asked.count(3) == 0


def test_single_sample_that_does_not_fit_is_an_error(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    with pytest.raises(torch.OutOfMemoryError):
        train(Small(model, room=0), model.adapter(), [batch_of(model, examples)])


def test_other_errors_are_not_retried(load: Load, examples: list[Example]) -> None:
    tried = []

    def fail(*arguments: Any) -> Any:
        tried.append(1)
        raise RuntimeError("no")

    model = load("llama")
    with pytest.raises(RuntimeError, match="no"):
        in_memory(fail, model, batch_of(model, examples), seeded(), 1)
    assert len(tried) == 1


@pytest.mark.parametrize(("share", "count"), [(0.25, 1), (0.5, 2), (0.6, 3), (1.0, 4)])
def test_share_of_the_samples_is_perturbed_as_in_the_whole_batch(
    load: Load, examples: list[Example], share: float, count: int
) -> None:
    model = load("mistral")
    batch = batch_of(model, examples)
    perturb = functools.partial(perturbation.pgd, radius=0.3, steps=1)
    with model.attacking():
        whole = perturb(attacked(model, batch), model.embed(batch), batch.perturbable, seeded())
        some = on_share(perturb, model, batch, seeded(), share=share)
        again = on_share(perturb, model, batch, seeded(), share=share)
    assert torch.equal(some, again)
    chosen = some.flatten(1).norm(dim=1) > 0
    assert int(chosen.sum()) == count
    torch.testing.assert_close(some[chosen], whole[chosen], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("share", "size", "count"), [(0.28, 25, 7), (0.07, 100, 7), (0.29, 25, 8), (0.5, 3, 2)])
def test_share_is_rounded_up_from_what_it_says_not_from_its_floating_point(
    load: Load, share: float, size: int, count: int
) -> None:
    model = load("llama")
    batch = batch_of(model, [Example("film", "yes")] * size)
    delta = on_share(lambda loss, embeddings, *rest: torch.ones_like(embeddings), model, batch, seeded(), share=share)
    assert int(delta.flatten(1).any(1).sum()) == count


def test_samples_left_as_they_are_count_as_much_in_a_mixed_loss_as_the_others(
    load: Load, examples: list[Example]
) -> None:
    model = load("llama")
    batch = batch_of(model, examples)
    mixed = functools.partial(objective.mixed, weight=2.0)

    def nowhere(loss: Any, embeddings: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(embeddings)

    loss, _ = adversarial_gradient(model, batch, seeded(), perturb=nowhere, objective=mixed, share=0.5)
    with model.evaluating():
        losses = model.supervised_losses(batch)
    assert float(loss) == pytest.approx(3 * float(losses.mean()), rel=1e-5)


def test_recorded_length_is_that_of_the_perturbed_samples(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    update = train(model, model.adapter(), [batch_of(model, examples)] * 2, share=0.5)
    assert update.metrics["perturbation"] == pytest.approx(0.3, rel=0.01)


def test_every_other_batch_is_trained_clean(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    start, batch = model.adapter(), batch_of(model, examples)
    found: list[bool] = []

    def perturb(loss: Any, embeddings: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        found.append(True)
        return perturbation.pgd(loss, embeddings, mask, generator, radius=0.3, steps=1)

    update = train(model, start, [batch] * 5, perturb=perturb, every=2)
    assert len(found) == 3
    assert update.metrics["perturbation"] == pytest.approx(0.3, rel=1e-4)  # of the batches that were perturbed
