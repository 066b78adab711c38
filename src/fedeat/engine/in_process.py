"""Runs a cohort on this machine over one base model: clients take turns, only the adapter is swapped.

Memory holds one base model and one optimiser whatever the number of clients; each client adds its tokenised
examples and, until its round is aggregated, one adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from fedeat import seeding
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch, Encoded, length_grouped, require_targets
from fedeat.engine.batched import Client, client_updates
from fedeat.model import AdaptedModel
from fedeat.updates import Adapter, ClientUpdate


@dataclass(frozen=True)
class Batching:
    """How a client's examples become batches.

    Attributes:
        batch_size: >= 1, samples a step at most.
        max_steps: >= 1, steps a round at most, None for no limit. With fewer steps than an epoch holds, each round
            sees another random part of the data.
        tokens: >= 1, tokens of a batch at most, its padding counted; None for no limit.
        blind: batches are drawn without a look at the examples, not even at their lengths.
    """

    batch_size: int
    max_steps: int | None = None
    tokens: int | None = None
    blind: bool = False


def run_clients(
    adapter: Adapter,
    cohort: Sequence[int],
    index: int,
    *,
    model: AdaptedModel,
    shards: Mapping[int, Sequence[Encoded]],
    training: Callable[[int], LocalTraining],
    batching: Batching,
    seed: int,
    clients_per_batch: int = 1,
    on_client: Callable[[int, int], None] = lambda index, done: None,
) -> list[ClientUpdate]:
    """Trains a cohort, one client or group of clients after the other; with its keywords bound it is a `RunClients`.

    Args:
        adapter: the round's global adapter.
        cohort: the clients to train.
        index: the round.
        model: the one base model.
        shards: client -> its tokenised examples.
        training: round -> the clients' hyperparameters (the radius warms up over rounds).
        batching: how examples become batches.
        seed: the run's; each (round, client) has its own streams.
        clients_per_batch: >= 1, clients that train at once (`fedeat.engine.batched`); above 1, `can_stack` must hold
            for the model, and the training must draw nothing at random.
        on_client: told the round and how many of its clients are done, for a progress bar.

    Raises:
        DataError: a client of the cohort has no example, or one without an answer or label to learn.
    """
    for client_id in cohort:
        require_targets(shards[client_id], source=f"client {client_id}")

    def batches(client_id: int, epoch: int) -> Iterator[Batch]:
        order = seeding.derive(seed, "batches", index, client_id)
        return _batches(model, shards[client_id], batching, epoch, seed=order)

    def together(group: Sequence[int]) -> list[ClientUpdate]:
        clients = [Client(c, len(shards[c]), functools.partial(batches, c)) for c in group]
        return client_updates(model, adapter, clients, training=training(index))

    def alone(client_id: int) -> ClientUpdate:
        with _own_dropout(model, seeding.derive(seed, "dropout", index, client_id)):
            return client_update(
                model,
                adapter,
                functools.partial(batches, client_id),
                client_id=client_id,
                num_examples=len(shards[client_id]),
                training=training(index),
                generator=seeding.generator(seed, "perturbation", index, client_id),
            )

    updates: list[ClientUpdate] = []
    for start in range(0, len(cohort), clients_per_batch):
        group = cohort[start : start + clients_per_batch]
        found: list[ClientUpdate] = []
        if len(group) > 1:
            with suppress(torch.OutOfMemoryError):  # one by one they need less
                found = together(group)
        for client_id in group if not found else ():
            updates.append(alone(client_id))
            on_client(index, len(updates))
        if found:
            updates += found
            on_client(index, len(updates))
    return updates


def _batches(
    model: AdaptedModel, shard: Sequence[Encoded], batching: Batching, epoch: int, *, seed: int
) -> Iterator[Batch]:
    groups = _groups(shard, batching, epoch, seed=seed)
    if batching.max_steps is not None:
        earlier = epoch * len(groups)
        if batching.tokens is not None:  # an epoch has as many batches as its order makes
            earlier = sum(len(_groups(shard, batching, past, seed=seed)) for past in range(epoch))
        groups = groups[: max(0, batching.max_steps - earlier)]
    for group in groups:
        yield model.collate([shard[i] for i in group])


def _groups(shard: Sequence[Encoded], batching: Batching, epoch: int, *, seed: int) -> list[list[int]]:
    """An epoch's batches as indices, without regard to the limit on steps."""
    generator = seeding.generator(seed, epoch)
    if batching.blind:
        order = torch.randperm(len(shard), generator=generator)
        return [group.tolist() for group in torch.split(order, batching.batch_size)]
    lengths = [len(item.input_ids) for item in shard]
    return length_grouped(lengths, batching.batch_size, generator=generator, tokens=batching.tokens)


@contextmanager
def _own_dropout(model: AdaptedModel, seed: int) -> Iterator[None]:
    """Seeds the generators that dropout draws from, torch's global ones, and puts them back afterwards."""
    cards = sorted({p.device.index for p in model.network.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every accelerator of the machine
        for index in cards:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
