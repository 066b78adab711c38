"""Malicious clients that act alone: functions that wrap `RunClients`, so that an attack works on every engine.

    run_clients = sign_flip(run_clients, malicious=frozenset({2, 5, 7}), scale=4.0)

An attacker sends what it likes, but it must look like an update: names, shapes and dtypes are kept. NaN is the
exception that the server's check must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedeat import seeding
from fedeat.algorithm import RunClients
from fedeat.updates import Adapter, ClientUpdate


def choose_malicious(clients: Sequence[int], fraction: float, *, seed: int) -> frozenset[int]:
    """The malicious ones: `round(fraction * n)` of the clients, fewer than half, drawn once for a whole run.

    Args:
        clients: all n clients.
        fraction: 0 <= fraction < 0.5; rounding never makes it half, which no rule withstands.
        seed: the run's.
    """
    count = min(round(fraction * len(clients)), max(len(clients) - 1, 0) // 2)
    order = torch.randperm(len(clients), generator=seeding.generator(seed, "malicious")).tolist()
    return frozenset(clients[i] for i in order[:count])


def sign_flip(run_clients: RunClients, *, malicious: frozenset[int], scale: float) -> RunClients:
    """Malicious clients train honestly and send `-scale` times their update (scaled sign flip)."""
    return _tampered(run_clients, malicious, lambda update, index: _map(update, lambda name, t: -scale * t))


def gaussian(run_clients: RunClients, *, malicious: frozenset[int], scale: float, seed: int) -> RunClients:
    """Malicious clients send Gaussian noise, `scale` times as long as their own update, tensor by tensor.

    A client whose update of a tensor is zero sends noise of length `scale` there.
    """

    def tamper(update: ClientUpdate, index: int) -> ClientUpdate:
        def noise(name: str, tensor: Tensor) -> Tensor:
            generator = seeding.generator(seed, "gaussian", index, update.client_id, name)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            length = float(tensor.norm()) or 1.0
            return drawn * (scale * length / max(float(drawn.norm()), 1e-12))

        return _map(update, noise)

    return _tampered(run_clients, malicious, tamper)


def not_a_number(run_clients: RunClients, *, malicious: frozenset[int]) -> RunClients:
    """Malicious (or broken) clients send NaN everywhere; a server that averages is lost, a check rejects them."""
    return _tampered(
        run_clients, malicious, lambda update, index: _map(update, lambda name, t: torch.full_like(t, torch.nan))
    )


def model_replacement(run_clients: RunClients, *, malicious: frozenset[int], scale: float | None = None) -> RunClients:
    """Malicious clients send their update many times over, to outlive the averaging (Bagdasaryan et al., 2020).

    Args:
        run_clients: the engine, in which the malicious clients hold poisoned data.
        malicious: who they are.
        scale: > 0; by default the round's updates over its malicious ones, at which a mean becomes their own update
            and the honest clients' share of theirs.
    """

    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        updates = run_clients(adapter, cohort, index)
        count = sum(update.client_id in malicious for update in updates)
        factor = len(updates) / max(count, 1) if scale is None else scale
        return [
            _map(update, lambda name, t: factor * t) if update.client_id in malicious else update for update in updates
        ]

    return run


def _tampered(
    run_clients: RunClients, malicious: frozenset[int], tamper: Callable[[ClientUpdate, int], ClientUpdate]
) -> RunClients:
    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        updates = run_clients(adapter, cohort, index)
        return [tamper(update, index) if update.client_id in malicious else update for update in updates]

    return run


def _map(update: ClientUpdate, change: Callable[[str, Tensor], Tensor]) -> ClientUpdate:
    return replace(update, delta={name: change(name, tensor) for name, tensor in update.delta.items()})
