"""Runs a cohort on this machine over one base model: clients take turns, only the adapter is swapped.

Memory holds one base model and one optimiser whatever the number of clients; each client adds its tokenised
examples and, until its round is aggregated, one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedeat import seeding
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch, Encoded, length_grouped, require_targets
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
    """

    batch_size: int
    max_steps: int | None = None
    tokens: int | None = None


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
    on_client: Callable[[int, int], None] = lambda index, done: None,
) -> list[ClientUpdate]:
    """Trains a cohort one client after the other; with its keywords bound it is a `RunClients`.

    Args:
        adapter: the round's global adapter.
        cohort: the clients to train.
        index: the round.
        model: the one base model.
        shards: client -> its tokenised examples.
        training: round -> the clients' hyperparameters (the radius warms up over rounds).
        batching: how examples become batches.
        seed: the run's; each (round, client) has its own streams.
        on_client: told the round and how many of its clients are done, for a progress bar.

    Raises:
        DataError: a client of the cohort has no example, or one without an answer or label to learn.
    """
    updates = []
    for client_id in cohort:
        require_targets(shards[client_id], source=f"client {client_id}")
    for done, client_id in enumerate(cohort, start=1):

        def batches(epoch: int, client_id: int = client_id) -> Iterable[Batch]:
            order = seeding.derive(seed, "batches", index, client_id)
            return _batches(model, shards[client_id], batching, epoch, seed=order)

        with _own_dropout(model, seeding.derive(seed, "dropout", index, client_id)):
            update = client_update(
                model,
                adapter,
                batches,
                client_id=client_id,
                num_examples=len(shards[client_id]),
                training=training(index),
                generator=seeding.generator(seed, "perturbation", index, client_id),
            )
        updates.append(update)
        on_client(index, done)
    return updates


def _batches(
    model: AdaptedModel, shard: Sequence[Encoded], batching: Batching, epoch: int, *, seed: int
) -> Iterator[Batch]:
    generator = seeding.generator(seed, epoch)
    lengths = [len(item.input_ids) for item in shard]
    groups = length_grouped(lengths, batching.batch_size, generator=generator, tokens=batching.tokens)
    limit = len(groups)
    if batching.max_steps is not None:
        limit = max(0, batching.max_steps - epoch * len(groups))
    for group in groups[: min(limit, len(groups))]:
        yield model.collate([shard[i] for i in group])


def steps_per_round(examples: int, *, batching: Batching, local_epochs: int) -> int:
    """Optimiser steps a client with that many examples takes in a round."""
    steps = local_epochs * math.ceil(examples / batching.batch_size)
    return steps if batching.max_steps is None else min(steps, batching.max_steps)


@contextmanager
def _own_dropout(model: AdaptedModel, seed: int) -> Iterator[None]:
    """Seeds the generators that dropout draws from, torch's global ones, and puts them back afterwards."""
    cards = [model.device.index] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every accelerator of the machine
        for index in cards:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
