"""The in-process engine: one base, own streams for each client, nothing left behind."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat import objective, perturbation
from fedeat.algorithm import LocalTraining
from fedeat.data import Encoded, Example
from fedeat.engine.in_process import Batching, _batches, run_clients
from fedeat.errors import DataError
from fedeat.model import AdaptedModel, Lora
from fedeat.updates import ClientUpdate

Load = Callable[..., AdaptedModel]
TRAINING = LocalTraining(
    local_epochs=1,
    perturb=None,
    objective=objective.adversarial,
    optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
)


def shards_of(model: AdaptedModel, examples: list[Example], clients: int) -> dict[int, list[Encoded]]:
    encoded = [model.encode(example) for example in examples]
    return {client: encoded[client % 2 :] for client in range(clients)}


def run(
    model: AdaptedModel,
    shards: dict[int, list[Encoded]],
    cohort: list[int],
    *,
    training: LocalTraining = TRAINING,
    batching: Batching | None = None,
    index: int = 0,
    seed: int = 0,
) -> list[ClientUpdate]:
    return run_clients(
        START[id(model)],
        cohort,
        index,
        model=model,
        shards=shards,
        training=lambda index: training,
        batching=batching or Batching(2),
        seed=seed,
    )


START: dict[int, dict[str, Tensor]] = {}


@pytest.fixture
def model(load: Load) -> AdaptedModel:
    made = load("llama", lora=Lora(rank=2, dropout=0.1))
    START[id(made)] = made.adapter()
    return made


def equal(first: ClientUpdate, second: ClientUpdate) -> bool:
    return first.metrics == second.metrics and all(
        torch.equal(first.delta[name], second.delta[name]) for name in first.delta
    )


def test_dropout_gives_the_same_update_twice_and_leaves_the_global_generator(
    model: AdaptedModel, examples: list[Example]
) -> None:
    shards = shards_of(model, examples, 2)
    state = torch.get_rng_state()
    first = run(model, shards, [0, 1])
    torch.manual_seed(99)
    again = run(model, shards, [0, 1])
    assert all(map(equal, first, again))
    torch.set_rng_state(state)
    run(model, shards, [0])
    assert torch.equal(torch.get_rng_state(), state)


def test_clients_update_does_not_depend_on_who_went_before(model: AdaptedModel, examples: list[Example]) -> None:
    shards = shards_of(model, examples, 3)
    attack = functools.partial(perturbation.pgd, radius=0.5, steps=1, start="random")
    training = replace(TRAINING, perturb=attack)
    together = run(model, shards, [0, 1, 2], training=training)
    assert equal(run(model, shards, [2], training=training)[0], together[2])
    assert equal(run(model, shards, [1, 0], training=training)[0], together[1])


@pytest.mark.parametrize("change", [{"index": 1}, {"seed": 1}])
def test_round_and_seed_give_other_draws(model: AdaptedModel, examples: list[Example], change: dict[str, int]) -> None:
    shards = shards_of(model, examples, 1)
    assert not equal(run(model, shards, [0], **change)[0], run(model, shards, [0])[0])  # type: ignore[arg-type]


def test_base_weights_are_bitwise_unchanged_and_updates_are_not_zero(
    model: AdaptedModel, examples: list[Example]
) -> None:
    names = {name for name, parameter in model.network.named_parameters() if not parameter.requires_grad}
    before = {name: p.detach().clone() for name, p in model.network.named_parameters() if name in names}
    attack = functools.partial(perturbation.pgd, radius=0.5, steps=2)
    updates = run(model, shards_of(model, examples, 2), [0, 1], training=replace(TRAINING, perturb=attack))
    after = dict(model.network.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert all(update.metrics["update_norm"] > 0 for update in updates)
    assert updates[0].metrics["perturbation"] == pytest.approx(0.5, rel=0.01)
    assert 0 <= updates[0].metrics["padding"] < 1


def test_one_base_in_memory_however_many_clients(model: AdaptedModel, examples: list[Example]) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if issubclass(type(item), Tensor))

    adapter = sum(tensor.numel() for tensor in START[id(model)].values())
    shards = shards_of(model, examples, 12)
    run(model, shards, [0])
    before = tensors()
    held = [run(model, shards, list(range(clients))) for clients in (2, 12)]
    # Fourteen updates are held, and beside them nothing that grows.
    assert tensors() - before <= 14 * adapter + adapter
    assert len(held[1]) == 12


def test_optimiser_does_not_outlive_its_client(model: AdaptedModel, examples: list[Example]) -> None:
    made: list[weakref.ref[torch.optim.Optimizer]] = []

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        gc.collect()
        assert not any(reference() for reference in made)
        found = torch.optim.AdamW(parameters, lr=1e-2)  # type: ignore[arg-type]
        made.append(weakref.ref(found))
        return found

    run(model, shards_of(model, examples, 3), [0, 1, 2], training=replace(TRAINING, optimizer=optimizer))
    assert len(made) == 3
    assert all(parameter.grad is None for parameter in model.adapter_parameters().values())


@pytest.mark.parametrize(
    ("examples_", "batch_size", "epochs", "limit", "steps"),
    [(4, 2, 1, None, 2), (4, 3, 2, None, 4), (4, 2, 3, 4, 4), (4, 2, 1, 1, 1), (3, 8, 2, 9, 2)],
)
def test_steps_are_epochs_of_batches_up_to_the_limit(
    model: AdaptedModel,
    examples: list[Example],
    examples_: int,
    batch_size: int,
    epochs: int,
    limit: int | None,
    steps: int,
) -> None:
    batching = Batching(batch_size, limit)
    shards = {0: shards_of(model, examples, 1)[0][:examples_]}
    update = run(model, shards, [0], training=replace(TRAINING, local_epochs=epochs), batching=batching)[0]
    assert update.metrics["steps"] == steps
    assert update.num_examples == examples_


@pytest.mark.parametrize("limit", [10, 60, 100, 150, 1000])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_limit_on_steps_holds_where_a_token_budget_makes_epochs_of_unlike_length(limit: int, seed: int) -> None:
    lengths = torch.randint(5, 80, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    shard = [Encoded((1,) * length, (True,) * length, answer_start=1) for length in lengths]
    gathers: Any = SimpleNamespace(collate=list)

    def epochs(limit: int | None) -> list[list[list[Encoded]]]:
        batching = Batching(4, limit, tokens=100)
        return [list(_batches(gathers, shard, batching, epoch, seed=seed)) for epoch in range(4)]

    everything = [batch for epoch in epochs(None) for batch in epoch]
    assert len({len(epoch) for epoch in epochs(None)}) > 1
    assert [batch for epoch in epochs(limit) for batch in epoch] == everything[:limit]


def test_progress_is_told_after_each_client(model: AdaptedModel, examples: list[Example]) -> None:
    told: list[tuple[int, int]] = []
    run_clients(
        START[id(model)],
        [0, 1],
        3,
        model=model,
        shards=shards_of(model, examples, 2),
        training=lambda index: TRAINING,
        batching=Batching(4),
        seed=0,
        on_client=lambda index, done: told.append((index, done)),
    )
    assert told == [(3, 1), (3, 2)]


def test_example_without_a_target_is_refused_before_any_training(model: AdaptedModel, examples: list[Example]) -> None:
    shards = shards_of(model, examples, 2)
    shards[1] = [*shards[1], model.encode(Example("a prompt alone"))]
    with pytest.raises(DataError, match=r"client 1: 1 of 4 examples have no answer .* number 4"):
        run(model, shards, [0, 1])
