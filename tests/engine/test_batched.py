"""Clients trained together against the same clients trained one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedeat import objective, perturbation, variants
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Encoded, Example
from fedeat.engine import in_process
from fedeat.engine.batched import Client, client_updates
from fedeat.engine.in_process import Batching, run_clients
from fedeat.errors import ModelError
from fedeat.model import AdaptedModel, Lora, packing
from fedeat.model.stacking import StackedModel, can_stack, stack
from fedeat.updates import ClientUpdate, norm

Load = Callable[..., AdaptedModel]
TRAINING = LocalTraining(
    local_epochs=2,
    perturb=functools.partial(perturbation.pgd, radius=0.3, steps=2),
    objective=objective.adversarial,
    optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
)


def calm(model: AdaptedModel) -> AdaptedModel:
    for parameter in model.network.parameters():
        parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
    return model


def unequal_shards(model: AdaptedModel, examples: list[Example]) -> dict[int, list[Encoded]]:
    encoded = [model.encode(example) for example in examples]
    return {0: encoded, 1: encoded[:1], 2: encoded[1:], 3: encoded[2:3]}


def run(
    model: AdaptedModel, examples: list[Example], together: int, training: LocalTraining = TRAINING, **options: Any
) -> list[ClientUpdate]:
    return run_clients(
        model.adapter(),
        [0, 1, 2, 3],
        0,
        model=model,
        shards=unequal_shards(model, examples),
        training=lambda index: training,
        batching=Batching(2),
        seed=0,
        clients_per_batch=together,
        **options,
    )


def assert_equal(got: list[ClientUpdate], expected: list[ClientUpdate], tolerance: float = 1e-4) -> None:
    assert [update.client_id for update in got] == [update.client_id for update in expected]
    for one, other in zip(got, expected, strict=True):
        apart = norm({name: one.delta[name] - other.delta[name] for name in other.delta})
        assert apart <= tolerance * norm(other.delta), f"client {one.client_id}: {apart / norm(other.delta):.1e}"
        assert one.num_examples == other.num_examples
        assert one.metrics == pytest.approx(dict(other.metrics), rel=1e-3)


@pytest.mark.parametrize("wide", [1, 192], ids=["packed", "padded"])
def test_clients_train_together_as_they_do_alone(
    anyone: str, wide: int, load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WIDE", wide)
    model = calm(load(anyone))
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    start = model.adapter()
    together = run(model, examples, 4)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    assert not [module for module in model.network.modules() if "forward" in module.__dict__]
    expected = run(model, examples, 1)
    assert {update.metrics["steps"] for update in together} == {2.0, 4.0}  # some leave early
    model.load_adapter(start)
    assert_equal(together, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"perturb": None},
        {"objective": functools.partial(objective.mixed, weight=0.5)},
        {"every": 2, "max_grad_norm": 0.01},
        {"variant": functools.partial(variants.freelb, ascent=perturbation.Ascent(0.3, 2))},
        {"variant": functools.partial(variants.harvested, ascent=perturbation.Ascent(0.3, 2), weight=0.5)},
    ],
    ids=["plain", "mixed", "every second batch", "freelb", "harvested"],
)
def test_variants_train_together_as_they_do_alone(load: Load, examples: list[Example], changes: dict[str, Any]) -> None:
    model = calm(load("qwen2", gradient_checkpointing="every" in changes))
    start = model.adapter()
    training = replace(TRAINING, **changes)
    together = run(model, examples, 3, training)
    model.load_adapter(start)
    assert_equal(together, run(model, examples, 1, training))


def test_clients_of_unequal_ranks_train_together_as_they_do_alone(load: Load, examples: list[Example]) -> None:
    models = [calm(load("llama", lora=Lora(rank=rank, alpha=2.0 * rank))) for rank in (2, 4, 1)]
    encoded = [models[0].encode(example) for example in examples]
    batches = [[models[0].collate(encoded[i:])] * 2 for i in range(3)]
    starts = [model.adapter() for model in models]
    expected = [
        client_update(
            model,
            model.adapter(),
            functools.partial(lambda b, epoch: b, own),
            client_id=i,
            num_examples=1,
            training=TRAINING,
            generator=torch.Generator(),
        )
        for i, (model, own) in enumerate(zip(models, batches, strict=True))
    ]
    clients = [
        Client(i, 1, functools.partial(lambda b, epoch: b, own), start)
        for i, (own, start) in enumerate(zip(batches, starts, strict=True))
    ]
    assert_equal(client_updates(models[0], starts[0], clients, training=TRAINING), expected)
    wide = {name: torch.cat([tensor, tensor], 1) for name, tensor in starts[0].items()}
    with pytest.raises(ModelError, match="by more than a rank"):
        client_updates(models[0], wide, [replace(clients[0], adapter=wide)], training=replace(TRAINING, perturb=None))


def test_clients_out_of_memory_together_train_alone(
    load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calm(load("llama"))
    start = model.adapter()
    expected = run(model, examples, 1)
    model.load_adapter(start)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(in_process, "client_updates", fail)
    told: list[tuple[int, int]] = []
    found = run(model, examples, 3, on_client=lambda index, done: told.append((index, done)))
    assert_equal(found, expected, 0.0)
    assert told == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_gradient_of_one_client_does_not_reach_another(load: Load, examples: list[Example]) -> None:
    model = calm(load("gemma2"))
    stacked = StackedModel(model, [model.adapter()] * 2)
    batch = model.collate([model.encode(example) for example in examples[:2]])
    joint = stack([batch, batch], pad_id=0)
    with stacked.training():
        torch.autograd.backward(joint.mean(stacked.supervised_losses(joint))[0])
    assert stacked.leaves[0].grad is not None
    assert stacked.leaves[1].grad is not None
    assert float(stacked.leaves[0].grad.norm()) > 0
    assert not bool(stacked.leaves[1].grad.any())


def test_clients_samples_of_unequal_length_run_in_one_row_and_to_the_same_losses(
    load: Load, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WIDE", 1)
    model = calm(load("llama"))
    stacked = StackedModel(model, [model.adapter()] * len(examples))
    joint = stack([model.collate([model.encode(example)]) for example in examples], pad_id=0)
    seen: list[tuple[int, ...]] = []
    layer = next(iter(stacked._forwards))
    with stacked.training(), layer.base_layer.register_forward_hook(lambda _, args, out: seen.append(args[0].shape)):
        in_a_row = stacked.supervised_losses(joint)
        monkeypatch.setattr(packing, "WASTEFUL", 1.0)
        padded = stacked.supervised_losses(joint)
    assert [shape[:2] for shape in seen] == [(1, int(joint.attention_mask.sum())), tuple(joint.attention_mask.shape)]
    assert torch.allclose(in_a_row, padded, rtol=1e-4)


def test_models_whose_clients_cannot_train_together_are_told_apart(load: Load) -> None:
    assert can_stack(load("gpt2"))
    assert can_stack(load("bert-classifier"))
    assert not can_stack(load("llama", lora=Lora(rank=2, dropout=0.1)))
    assert not can_stack(load("llama", lora=Lora(rank=2, target_modules=("embed_tokens",))))
    assert not can_stack(load("llama", dtype="float16"))
