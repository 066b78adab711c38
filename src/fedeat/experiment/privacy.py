"""From a configuration to differentially private training, and what it costs: epsilon, by Opacus' accountant."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedeat.config import Config
from fedeat.passes import Gradient
from fedeat.privacy import private
from fedeat.updates import ClientUpdate

_TOLD = ("steps", "update_norm")
"""Metrics that are no more than the update itself tells; a loss would be told without noise."""


def fresh_noise(config: Config) -> bool:
    """Whether clients draw noise that nobody can draw again: training twice then tells twice as much."""
    return bool(config.privacy.noise_multiplier) and not config.privacy.seeded


def private_gradient(config: Config) -> Callable[[Gradient[Any]], Gradient[Any]] | None:
    """What makes a gradient private; None where the configuration adds no noise.

    Noise is drawn from a seed of the operating system, for whoever knows the run's could take it off again; or from the
    run's, where the configuration says so.
    """
    section = config.privacy
    if not section.noise_multiplier:
        return None
    noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(8)) >> 1) if fresh_noise(config) else None
    return functools.partial(
        private,
        clip=section.clip,
        noise_multiplier=section.noise_multiplier,
        batch_size=config.client.batch_size,
        noise=noise,
    )


def telling_little(engine: Callable[..., list[ClientUpdate]], config: Config) -> Callable[..., list[ClientUpdate]]:
    """An engine whose updates tell what privacy allows."""
    if not config.privacy.noise_multiplier:
        return engine

    def run(adapter: Any, cohort: Any, index: int, **options: Any) -> list[ClientUpdate]:
        return [
            replace(update, metrics={name: update.metrics[name] for name in _TOLD if name in update.metrics})
            for update in engine(adapter, cohort, index, **options)
        ]

    return run


def spent(config: Config, index: int) -> float | None:
    """The epsilon of a run up to a round, None without privacy: from the configuration, not from a client's claim.

    It is a bound: as if each client had been in every round so far.
    """
    section = config.privacy
    if not section.noise_multiplier:
        return None
    releases = config.client.local_epochs * (index + 1)
    return epsilon(noise_multiplier=section.noise_multiplier, releases=releases, delta=section.delta)


def epsilon(*, noise_multiplier: float, releases: int, delta: float) -> float:
    """The epsilon of that many releases, each with every record in it, by a Renyi accountant (extra `privacy`).

    Args:
        noise_multiplier: > 0.
        releases: >= 1, epochs of all rounds so far.
        delta: 0..1, exclusive.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, 1.0, releases)]
    return float(accountant.get_epsilon(delta=delta))
