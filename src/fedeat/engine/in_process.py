"""Runs a cohort on this machine over one base model: clients take turns, only the adapter is swapped.

Memory holds one base model and one optimiser whatever the number of clients; each client adds its tokenised
examples and, until its round is aggregated, one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedeat import seeding
from fedeat.algorithm import LocalTraining, client_update
from fedeat.data import Batch, Encoded, length_grouped
from fedeat.model import AdaptedModel
from fedeat.updates import Adapter, ClientUpdate


@dataclass(frozen=True)
class Batching:
    """How a client's examples become batches.

    Attributes:
        batch_size: >= 1, samples a step.
        max_steps: >= 1, steps a round at most, None for no limit. With fewer steps than an epoch holds, each round
            sees another random part of the data.
    """

    batch_size: int
    max_steps: int | None = None


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
    """
    updates = []
    for done, client_id in enumerate(cohort, start=1):
        # Dropout draws from torch's global generator: it is set for this client and put back after it.
        with torch.random.fork_rng(devices=_accelerators(model)):
            torch.manual_seed(seeding.derive(seed, "dropout", index, client_id))
            updates.append(
                client_update(
                    model,
                    adapter,
                    lambda epoch, client_id=client_id: _batches(  # type: ignore[misc]
                        model,
                        shards[client_id],
                        batching,
                        epoch,
                        seed=seeding.derive(seed, "batches", index, client_id),
                    ),
                    client_id=client_id,
                    num_examples=len(shards[client_id]),
                    training=training(index),
                    generator=seeding.generator(seed, "perturbation", index, client_id),
                )
            )
        on_client(index, done)
    return updates


def _batches(
    model: AdaptedModel, shard: Sequence[Encoded], batching: Batching, epoch: int, *, seed: int
) -> Iterator[Batch]:
    generator = seeding.generator(seed, epoch)
    groups = length_grouped([len(item.input_ids) for item in shard], batching.batch_size, generator=generator)
    limit = len(groups)
    if batching.max_steps is not None:
        limit = max(0, batching.max_steps - epoch * len(groups))
    for group in groups[: min(limit, len(groups))]:
        yield model.collate([shard[i] for i in group])


def steps_per_round(examples: int, *, batching: Batching, local_epochs: int) -> int:
    """Optimiser steps a client with that many examples takes in a round."""
    steps = local_epochs * math.ceil(examples / batching.batch_size)
    return steps if batching.max_steps is None else min(steps, batching.max_steps)


def _accelerators(model: AdaptedModel) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
