"""Malicious clients that collude: they see the round's honest updates before they send their own.

    run_clients = little_is_enough(run_clients, malicious=frozenset({2, 5, 7}))

The strongest attackers of the literature know what the honest clients send and look like one of them. All malicious
clients of a round send the same update, made of the honest ones (x_i the honest updates, m their mean):

    inner_product     -scale * m                                     Xie et al., 2020 (IPM)
    little_is_enough  m - z * deviation, coordinate by coordinate    Baruch et al., 2019 (ALIE)
    mimic             one honest client's update                     Karimireddy et al., 2022
    min_max           m - gamma * m/|m|, no farther from any honest update than these from each other
                                                                     Shejwalkar and Houmansadr, 2021
    adaptive          m - gamma * m/|m|, gamma tried against the server's own rule for the most damage
                                                                     Fang et al., 2020; Shejwalkar and Houmansadr, 2021

An honest update that the server would reject tells them nothing. Where a cohort holds no honest client they take
their own updates for honest ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.algorithm import Aggregate, RunClients
from fedeat.updates import Adapter, ClientUpdate, difference, norm, validate

Craft: TypeAlias = Callable[[Sequence[ClientUpdate], Sequence[ClientUpdate], Adapter], Adapter]
"""(what the honest clients send, what the malicious ones would, the global adapter) -> what the malicious ones send."""


def colluding(run_clients: RunClients, *, malicious: frozenset[int], craft: Craft) -> RunClients:
    """Malicious clients send one update that they make together of the round's honest ones.

    Args:
        run_clients: the engine.
        malicious: who they are.
        craft: makes the update; anything that keeps the adapter's names, shapes and dtypes.
    """

    def run(adapter: Adapter, cohort: Sequence[int], index: int) -> list[ClientUpdate]:
        updates = run_clients(adapter, cohort, index)
        usable, _ = validate(updates, adapter, cohort)
        own = [update for update in usable if update.client_id in malicious]
        honest = [update for update in usable if update.client_id not in malicious] or own
        if not own:
            return updates
        delta = craft(honest, own, adapter)
        return [replace(update, delta=delta) if update in own else update for update in updates]

    return run


def inner_product(run_clients: RunClients, *, malicious: frozenset[int], scale: float) -> RunClients:
    """Inner-product manipulation: minus `scale` times the honest mean, so that a step along it climbs the loss.

    A small scale hides among honest updates that scatter; a mean turns round only above (honest / malicious).
    """

    def craft(honest: Sequence[ClientUpdate], own: Sequence[ClientUpdate], adapter: Adapter) -> Adapter:
        return {name: -scale * tensor for name, tensor in _mean(honest).items()}

    return colluding(run_clients, malicious=malicious, craft=craft)


def little_is_enough(run_clients: RunClients, *, malicious: frozenset[int], z: float | None = None) -> RunClients:
    """A little is enough: the honest mean shifted by `z` standard deviations in every coordinate.

    Args:
        run_clients: the engine.
        malicious: who they are.
        z: > 0; by default the largest at which, were updates normal, enough honest ones lie farther out for the
            attackers to pass for the majority's side (`hidden_deviations`).
    """

    def craft(honest: Sequence[ClientUpdate], own: Sequence[ClientUpdate], adapter: Adapter) -> Adapter:
        shift = hidden_deviations(len(honest) + len(own), len(own)) if z is None else z
        mean = _mean(honest)
        spread = {name: torch.stack([update.delta[name] for update in honest]).std(0, correction=0) for name in adapter}
        return {name: mean[name] - shift * spread[name] for name in adapter}

    return colluding(run_clients, malicious=malicious, craft=craft)


def hidden_deviations(updates: int, malicious: int) -> float:
    """ALIE's z: standard deviations from the honest mean at which `malicious` of `updates` can still hide.

    They need `floor(updates / 2 + 1) - malicious` honest clients farther out than themselves.
    """
    honest = updates - malicious
    needed = min(max(updates // 2 + 1 - malicious, 1), honest - 1)
    return max(0.0, NormalDist().inv_cdf((honest - needed) / honest)) if needed > 0 else 0.0


def mimic(run_clients: RunClients, *, malicious: frozenset[int]) -> RunClients:
    """Everybody copies one honest client, which then counts many times over: nothing in the update can give it away.

    The one copied is the farthest out along the direction in which the honest updates differ most. The paper keeps one
    client for a whole training; here it is chosen each round, as the cohort changes.
    """

    def craft(honest: Sequence[ClientUpdate], own: Sequence[ClientUpdate], adapter: Adapter) -> Adapter:
        centre = _mean(honest)
        centred = [difference(update.delta, centre) for update in honest]
        gram = torch.tensor([[_dot(a, b) for b in centred] for a in centred], dtype=torch.float64)
        outermost = torch.linalg.eigh(gram).eigenvectors[:, -1].abs()
        return honest[int((outermost > outermost.max() - 1e-9).nonzero()[0])].delta

    return colluding(run_clients, malicious=malicious, craft=craft)


def min_max(run_clients: RunClients, *, malicious: frozenset[int]) -> RunClients:
    """As far against the honest mean as no distance gives away: not farther from any than the farthest two apart."""

    def craft(honest: Sequence[ClientUpdate], own: Sequence[ClientUpdate], adapter: Adapter) -> Adapter:
        mean = _mean(honest)
        against = _unit(mean)
        widest = max(norm(difference(a.delta, b.delta)) for a in honest for b in honest)
        reach = math.inf
        for update in honest:  # |m - gamma p - x_i|^2 <= widest^2, a quadratic in gamma
            apart = difference(mean, update.delta)
            along, square = _dot(against, apart), norm(apart) ** 2
            reach = min(reach, along + math.sqrt(max(along**2 + widest**2 - square, 0.0)))
        return _shifted(mean, against, max(reach, 0.0))

    return colluding(run_clients, malicious=malicious, craft=craft)


def adaptive(run_clients: RunClients, *, malicious: frozenset[int], aggregate: Aggregate) -> RunClients:
    """Attackers who know the server's rule and send what moves its result farthest back against the honest mean.

    They run the rule on the honest updates and on candidates at growing distance: too near does nothing, too far is
    thrown out, and just inside lies the worst. Distances of 1/64 to 64 times the honest updates' spread are tried,
    then those between the best one's neighbours.

    Args:
        run_clients: the engine.
        malicious: who they are.
        aggregate: the server's own, with its options.
    """

    def craft(honest: Sequence[ClientUpdate], own: Sequence[ClientUpdate], adapter: Adapter) -> Adapter:
        mean = _mean(honest)
        against = _unit(mean)
        spread = max(norm(difference(update.delta, mean)) for update in honest) or norm(mean)
        others = [update for update in honest if update not in own]  # none where their own are taken for honest ones

        def damage(distance: float) -> float:
            delta = _shifted(mean, against, distance)
            sent = sorted([*others, *(replace(update, delta=delta) for update in own)], key=lambda u: u.client_id)
            return _dot(against, difference(mean, aggregate(sent, adapter).value))

        tried = {distance: damage(distance) for distance in (spread * 2.0**power for power in range(-6, 7))}
        for _ in range(3):
            best = max(tried, key=lambda distance: tried[distance])
            for factor in (0.0, 1.0):
                ordered = sorted(tried)
                place = ordered.index(best)
                beside = ordered[min(max(place + (1 if factor else -1), 0), len(ordered) - 1)]
                tried.setdefault(math.sqrt(best * beside), damage(math.sqrt(best * beside)))
        return _shifted(mean, against, max(tried, key=lambda distance: tried[distance]))

    return colluding(run_clients, malicious=malicious, craft=craft)


def _mean(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    return {name: torch.stack([update.delta[name] for update in updates]).mean(0) for name in updates[0].delta}


def _dot(a: Adapter, b: Adapter) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _unit(delta: Adapter) -> dict[str, Tensor]:
    """The update at length one; zero where it is zero, and an attack then has no direction."""
    length = norm(delta) or 1.0
    return {name: tensor / length for name, tensor in delta.items()}


def _shifted(start: Adapter, direction: Adapter, distance: float) -> dict[str, Tensor]:
    """`start - distance * direction`."""
    return {name: tensor - distance * direction[name] for name, tensor in start.items()}
