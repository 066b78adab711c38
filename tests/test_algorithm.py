"""Both algorithms against textbook versions of them written here, and the server's rules for bad input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedeat import aggregation, objective, perturbation
from fedeat.algorithm import LocalTraining, Round, client_update, draw_cohort, run_rounds, server_round
from fedeat.data import Batch, Example
from fedeat.errors import QuorumError
from fedeat.model import AdaptedModel, packing
from fedeat.updates import Adapter, ClientUpdate, apply, norm

Load = Callable[..., AdaptedModel]
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def training(**changes: Any) -> LocalTraining:
    plain = LocalTraining(2, perturb=None, objective=objective.adversarial, optimizer=SGD)
    return replace(plain, **changes)


def train(model: AdaptedModel, start: Adapter, batches: list[Batch], settings: LocalTraining) -> ClientUpdate:
    return client_update(
        model,
        start,
        lambda epoch: batches,
        client_id=0,
        num_examples=4,
        training=settings,
        generator=torch.Generator().manual_seed(0),
    )


def batches_of(model: AdaptedModel, examples: list[Example]) -> list[Batch]:
    encoded = [model.encode(example) for example in examples]
    return [model.collate(encoded[:3]), model.collate(encoded[3:])]


def textbook(
    model: AdaptedModel, start: Adapter, batches: list[Batch], *, radius: float, steps: int, weight: float | None
) -> dict[str, Tensor]:
    """Alg. 1 as a beginner writes it: embedding vectors as input, all logits, labels, gradients of everything."""
    model.load_adapter(start)
    network, parameters = model.network, list(model.adapter_parameters().values())
    optimizer = SGD(parameters)

    def losses(batch: Batch, delta: Tensor) -> Tensor:
        vectors = network.get_input_embeddings()(batch.input_ids).detach() + delta
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        logits = network(inputs_embeds=vectors, attention_mask=batch.attention_mask, **types).logits
        if batch.classes is None:
            return F.cross_entropy(logits.flatten(0, 1)[batch.rows], batch.targets, reduction="none")
        blocks = [row[start:stop] for row, (start, stop) in zip(logits, batch.classes.tolist(), strict=True)]
        targets = batch.targets - batch.classes[:, 0]
        return torch.stack([F.cross_entropy(row, target) for row, target in zip(blocks, targets, strict=True)])

    for _ in range(2):
        for batch in batches:
            delta = torch.zeros(*batch.input_ids.shape, 32)
            for _ in range(steps):
                delta.requires_grad_(True)
                total = (losses(batch, delta) / torch.bincount(batch.samples)[batch.samples]).sum()
                gradient = torch.autograd.grad(total, delta)[0] * batch.perturbable[..., None]
                length = gradient.norm(dim=-1, keepdim=True)
                delta = delta.detach() + 2.5 * radius / steps * gradient / length.clamp_min(1e-30)
                delta = delta * (radius / delta.norm(dim=-1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
            loss = losses(batch, delta).mean()
            if weight is not None:
                loss = losses(batch, torch.zeros_like(delta)).mean() + weight * loss
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return {name: tensor - start[name] for name, tensor in model.adapter().items()}


def calm(model: AdaptedModel) -> AdaptedModel:
    """The model with weights so small that ascent steps do not amplify the last digit of float32."""
    for parameter in model.network.parameters():
        parameter.data.mul_(0.25 if parameter.ndim > 1 else 1.0)
    return model


def assert_equal_updates(got: Adapter, expected: Adapter, rel: float) -> None:
    apart = norm({name: got[name] - expected[name] for name in expected})
    assert apart <= rel * norm(expected), f"{apart / norm(expected):.2e}"


@pytest.mark.parametrize("wide", [1, 192], ids=["packed", "padded"])
@pytest.mark.parametrize(("weight", "merge"), [(None, True), (None, False), (0.7, True)])
def test_client_trains_as_the_textbook_does(
    anyone: str,
    load: Load,
    examples: list[Example],
    weight: float | None,
    merge: bool,
    wide: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "WIDE", wide)
    model = calm(load(anyone, merge_in_ascent=merge))
    start, batches = model.adapter(), batches_of(model, examples)
    if anyone == "llama-classifier":  # given embedding vectors, it cannot tell padding from text
        batches = [model.collate([model.encode(example)]) for example in examples[:2]]
    radius = 0.2 * model.embedding_unit("l2")
    attack = functools.partial(perturbation.pgd, radius=radius, steps=3)
    minimised = objective.adversarial if weight is None else functools.partial(objective.mixed, weight=weight)
    update = train(model, start, batches, training(perturb=attack, objective=minimised, unit=radius / 0.2))
    expected = textbook(model, start, batches, radius=radius, steps=3, weight=weight)
    assert_equal_updates(update.delta, expected, 1e-5)
    assert update.metrics["steps"] == 4
    assert 0 < update.metrics["perturbation"] <= 0.2 * (1 + 1e-5)
    assert update.metrics["update_norm"] == pytest.approx(norm(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "bert-classifier"])
def test_checkpointing_changes_no_update(name: str, load: Load, examples: list[Example]) -> None:
    found = []
    for checkpointing in (False, True):
        model = calm(load(name, gradient_checkpointing=checkpointing))
        attack = functools.partial(perturbation.pgd, radius=0.2 * model.embedding_unit("l2"), steps=2)
        found.append(train(model, model.adapter(), batches_of(model, examples), training(perturb=attack)).delta)
    assert_equal_updates(found[1], found[0], 1e-6)


def test_textbook_without_an_ascent_is_plain_training(causal: str, load: Load, examples: list[Example]) -> None:
    model = load(causal)
    start, batches = model.adapter(), batches_of(model, examples)
    expected = textbook(model, start, batches, radius=1.0, steps=0, weight=None)
    assert_equal_updates(train(model, start, batches, training()).delta, expected, 1e-5)


def test_no_perturbation_is_plain_training_bit_for_bit(anyone: str, load: Load, examples: list[Example]) -> None:
    model = load(anyone)
    start, batches = model.adapter(), batches_of(model, examples)
    plain = train(model, start, batches, training())
    pgd = functools.partial(perturbation.pgd, radius=1.0, steps=1)
    settings = {
        "zero radius": training(perturb=functools.partial(pgd, radius=0.0, step_size=0.0, start="random")),
        "K = 0": training(perturb=functools.partial(pgd, steps=0)),
        "fgsm": training(perturb=functools.partial(perturbation.fgsm, radius=0.0)),
        "random": training(perturb=functools.partial(perturbation.random, radius=0.0)),
        "weight 0": training(perturb=pgd, objective=functools.partial(objective.mixed, weight=0.0)),
    }
    for name, choice in settings.items():
        attacked = train(model, start, batches, choice)
        assert all(torch.equal(attacked.delta[key], plain.delta[key]) for key in plain.delta), name
        assert attacked.metrics["loss"] == plain.metrics["loss"]


def test_global_adapter_is_not_mutated(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    start = model.adapter()
    before = {name: tensor.clone() for name, tensor in start.items()}
    train(model, start, batches_of(model, examples), training())
    assert all(torch.equal(start[name], before[name]) for name in start)


def test_gradients_left_by_an_interrupted_step_do_not_count(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    start, batches = model.adapter(), batches_of(model, examples)
    clean = train(model, start, batches, training())
    for parameter in model.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    again = train(model, start, batches, training())
    assert all(torch.equal(again.delta[name], clean.delta[name]) for name in clean.delta)


def test_client_without_a_batch_sends_zero_and_finite_metrics(load: Load) -> None:
    model = load("llama")
    update = train(model, model.adapter(), [], training())
    assert norm(update.delta) == 0.0
    assert all(math.isfinite(value) for value in update.metrics.values())


@dataclass(frozen=True)
class Mean:
    """What a rule returns."""

    value: Adapter
    weights: Tensor
    iterations: int = 0
    gap: float = math.nan


def average(updates: Sequence[ClientUpdate], adapter: Adapter) -> Mean:
    value = {name: torch.stack([update.delta[name] for update in updates]).mean(0) for name in adapter}
    return Mean(value, torch.full((len(updates),), 1 / len(updates), dtype=torch.float64))


GLOBAL = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4)}


def toward(client: int, index: int = 0) -> ClientUpdate:
    generator = torch.Generator().manual_seed(1000 * index + client)
    return ClientUpdate(client, {k: torch.randn(t.shape, generator=generator) for k, t in GLOBAL.items()}, 3)


def engine(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
    """Clients whose update depends on the adapter they were given."""
    return [
        replace(toward(client, index), delta={k: 0.1 * t - 0.01 * adapter[k] for k, t in toward(client).delta.items()})
        for client in cohort
    ]


def rounds_of(**changes: Any) -> list[Round]:
    options: dict[str, Any] = {
        "clients": range(7),
        "cohort_size": 4,
        "rounds": 5,
        "play": functools.partial(server_round, run_clients=engine, aggregate=average, quorum=2),
        "seed": 3,
        **changes,
    }
    return list(run_rounds(options.pop("adapter", GLOBAL), **options))


def test_zero_radius_and_the_mean_are_federated_averaging(load: Load, examples: list[Example]) -> None:
    model = load("llama")
    start, batches = model.adapter(), batches_of(model, examples)
    shards = {0: batches, 1: batches[:1], 2: batches[1:]}

    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        attack = functools.partial(perturbation.pgd, radius=0.0, steps=2)
        return [replace(train(model, adapter, shards[c], training(perturb=attack)), client_id=c) for c in cohort]

    def mean(updates: Sequence[ClientUpdate], adapter: Adapter) -> Any:
        return aggregation.aggregate([update.delta for update in updates], rule=aggregation.mean)

    play = functools.partial(server_round, run_clients=run, aggregate=mean, quorum=3)
    *_, last = run_rounds(start, clients=range(3), cohort_size=3, rounds=2, play=play, seed=0)
    fedavg = start
    for _ in range(2):  # McMahan et al. (2017): average the parameters that clients return
        locals_ = []
        for shard in shards.values():
            textbook_update = textbook(model, fedavg, shard, radius=0.0, steps=0, weight=None)
            locals_.append(apply(fedavg, textbook_update))
        fedavg = {name: torch.stack([local[name] for local in locals_]).mean(0) for name in fedavg}
    moved = {name: last.adapter[name] - start[name] for name in start}
    assert_equal_updates(moved, {name: fedavg[name] - start[name] for name in start}, 1e-4)
    assert dict(last.weights) == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3})


@pytest.mark.parametrize("rule", [aggregation.mean, aggregation.geometric_median])
def test_one_client_returns_itself(rule: Any) -> None:
    def aggregate(updates: Sequence[ClientUpdate], adapter: Adapter) -> Any:
        return aggregation.aggregate([update.delta for update in updates], rule=rule)

    options: dict[str, Any] = {"run_clients": lambda *asked: [toward(4)], "aggregate": aggregate, "quorum": 1}
    finished = server_round(GLOBAL, [4], 0, **options)
    expected = apply(GLOBAL, toward(4).delta)
    assert all(torch.equal(finished.adapter[name], expected[name]) for name in GLOBAL)
    assert dict(finished.weights) == {4: 1.0}
    assert finished.update_norm == pytest.approx(norm(toward(4).delta))
    assert finished.distances == {4: 0.0}


def test_unfit_updates_are_named_and_the_others_aggregated() -> None:
    nan = replace(toward(1), delta={**toward(1).delta, "b": torch.full((4,), math.nan)})
    answers = [toward(5), nan, replace(toward(2), delta={"a": torch.zeros(2, 3)}), toward(9), toward(0), toward(0)]
    finished = server_round(GLOBAL, [0, 1, 2, 3, 5], 0, run_clients=lambda *asked: answers, aggregate=average, quorum=2)
    assert [update.client_id for update in finished.updates] == [0, 5]
    assert list(finished.weights) == [0, 5]
    reasons = {item.client_id: item.reason for item in finished.rejected}
    assert set(reasons) == {0, 1, 2, 3, 9}
    for client, word in ((0, "twice"), (1, "NaN"), (2, "missing"), (3, "did not answer"), (9, "not asked")):
        assert word in reasons[client]


def test_missed_quorum_names_each_client_and_its_reason() -> None:
    nan = replace(toward(1), delta={**toward(1).delta, "b": torch.full((4,), math.nan)})
    with pytest.raises(QuorumError) as caught:
        server_round(GLOBAL, [0, 1, 2], 6, run_clients=lambda *asked: [toward(0), nan], aggregate=average, quorum=2)
    message = str(caught.value)
    assert message.startswith("round 6: 1 usable updates, expected at least 2 (federation.quorum) of the 3 clients")
    assert "client 1: tensor 'b' holds a NaN" in message
    assert "client 2: did not answer" in message


@pytest.mark.parametrize("first", [1, 2, 4])
def test_resumed_rounds_equal_uninterrupted_ones_bit_for_bit(first: int) -> None:
    whole = rounds_of()
    resumed = rounds_of(adapter=whole[first - 1].adapter, first_round=first)
    assert [item.index for item in resumed] == list(range(first, 5))
    for got, expected in zip(resumed, whole[first:], strict=True):
        assert got.cohort == expected.cohort
        assert all(torch.equal(got.adapter[name], expected.adapter[name]) for name in GLOBAL)


def test_finished_rounds_are_given_one_by_one() -> None:
    ran: list[int] = []

    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        ran.append(index)
        return engine(adapter, cohort, index)

    play = functools.partial(server_round, run_clients=run, aggregate=average, quorum=1)
    rounds = run_rounds(GLOBAL, clients=range(3), cohort_size=3, rounds=9, play=play, seed=0)
    assert ran == []
    assert next(rounds).index == 0
    assert ran == [0]


def test_cohort_is_a_function_of_seed_and_round_alone() -> None:
    clients = (3, 1, 4, 10, 5, 9)
    drawn = [draw_cohort(clients, 3, seed=0, index=index) for index in range(40)]
    assert drawn == [draw_cohort(clients, 3, seed=0, index=index) for index in range(40)]
    assert all(len(set(cohort)) == 3 and list(cohort) == sorted(cohort) for cohort in drawn)
    assert {client for cohort in drawn for client in cohort} == set(clients)
    assert drawn != [draw_cohort(clients, 3, seed=1, index=index) for index in range(40)]
    assert draw_cohort(clients, 6, seed=0, index=0) == tuple(sorted(clients))


class Quadratic:
    """A model of one's own: nothing but torch, and none of this package's classes."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(2, 3))

    def adapter(self) -> dict[str, Tensor]:
        return {"w": self.weight.detach().clone()}

    def load_adapter(self, adapter: Adapter) -> None:
        self.weight.data.copy_(adapter["w"])

    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"w": self.weight}

    def embed(self, batch: Batch) -> Tensor:
        return torch.nn.functional.one_hot(batch.input_ids, 2).float()

    def supervised_logits(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        return (self.embed(batch) + (0 if delta is None else delta)).reshape(-1, 2)[batch.rows] @ self.weight

    def supervised_losses(self, batch: Batch, delta: Tensor | None = None) -> Tensor:
        return F.cross_entropy(self.supervised_logits(batch, delta), batch.targets, reduction="none")

    training = attacking = staticmethod(nullcontext)


def test_any_model_of_the_protocol_trains() -> None:
    ids = torch.tensor([[0, 1]])
    row = torch.tensor([0, 1])
    batch = Batch(ids, torch.ones_like(ids), ids >= 0, row, row, row * 0)
    attack = functools.partial(perturbation.pgd, radius=0.1, steps=2)
    model = Quadratic()
    update = client_update(
        model,
        model.adapter(),
        lambda epoch: [batch],
        client_id=0,
        num_examples=1,
        training=training(perturb=attack, local_epochs=20),
        generator=torch.Generator(),
    )
    assert update.metrics["steps"] == 20
    trained = model.adapter()["w"]
    assert float(trained[0, 0]) > 1 > float(trained[0, 2])
