"""How examples are spread over clients: evenly, skewed in labels, amounts or tasks, or by a natural column.

A partition is one tuple of example indices a client. Every example goes to one client and every client gets at
least one example; the same seed gives the same partition on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from fedeat import seeding
from fedeat.errors import DataError

Partition: TypeAlias = tuple[tuple[int, ...], ...]
"""Client 0..n-1 -> the indices of its examples, sorted."""


def iid(examples: int, clients: int, *, seed: int) -> Partition:
    """Equal shares of a random order; sizes differ by at most one.

    Raises:
        DataError: there are fewer examples than clients.
    """
    _check_enough(examples, clients)
    order = _rng(seed).permutation(examples)
    return tuple(tuple(sorted(part.tolist())) for part in np.array_split(order, clients))


def dirichlet(groups: Sequence[str], clients: int, *, alpha: float, seed: int) -> Partition:
    """Label skew: each group's examples are shared out in proportions drawn from Dirichlet(alpha).

    Hsu et al. (2019) and Li et al. (2022). Small alpha gives clients that see few groups; alpha -> infinity is IID.

    Args:
        groups: the label or category of each example.
        clients: n >= 1.
        alpha: > 0, concentration.
        seed: of the proportions and the order.

    Raises:
        DataError: there are fewer examples than clients.
    """
    _check_enough(len(groups), clients)
    rng = _rng(seed)
    shares: list[list[int]] = [[] for _ in range(clients)]
    members_of = _members(groups)
    for name in sorted(members_of):
        members = rng.permutation(members_of[name])
        proportions = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(proportions)[:-1] * len(members)).astype(int)
        for share, part in zip(shares, np.split(members, cuts), strict=True):
            share.extend(part.tolist())
    _feed_empty_clients(shares)
    return tuple(tuple(sorted(share)) for share in shares)


def quantity(examples: int, clients: int, *, alpha: float, seed: int) -> Partition:
    """Quantity skew: shares of a random order whose sizes are drawn from Dirichlet(alpha) (Li et al., 2022).

    Args:
        examples: how many there are.
        clients: n >= 1.
        alpha: > 0, concentration; small alpha gives a few clients nearly everything, alpha -> infinity is IID.
        seed: of the sizes and the order.

    Raises:
        DataError: there are fewer examples than clients.
    """
    _check_enough(examples, clients)
    rng = _rng(seed)
    order = rng.permutation(examples)
    cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * examples).astype(int)
    shares = [part.tolist() for part in np.split(order, cuts)]
    _feed_empty_clients(shares)
    return tuple(tuple(sorted(share)) for share in shares)


def by_task(tasks: Sequence[str], clients: int, *, seed: int) -> Partition:
    """Task skew: each client holds one task's examples, in equal shares among the task's clients.

    Clients go to the tasks in turn, so client i holds task i modulo their number, in the order of their sorted names.

    Args:
        tasks: the task of each example.
        clients: n >= the number of tasks.
        seed: of the order.

    Raises:
        DataError: there are fewer clients than tasks, or a task has fewer examples than clients.
    """
    members_of = _members(tasks)
    names = sorted(members_of)
    if clients < len(names):
        raise DataError(
            f"{clients} clients cannot hold one task each of {len(names)}: {', '.join(names)}. Raise partition.clients "
            "or leave tasks out of data.train."
        )
    rng = _rng(seed)
    shares: list[tuple[int, ...]] = [()] * clients
    for number, name in enumerate(names):
        holders = range(number, clients, len(names))
        _check_enough(len(members_of[name]), len(holders), of=f" of task {name!r}")
        for client, part in zip(holders, np.array_split(rng.permutation(members_of[name]), len(holders)), strict=True):
            shares[client] = tuple(sorted(part.tolist()))
    return tuple(shares)


def by_column(groups: Sequence[str]) -> Partition:
    """One client for each distinct value of a natural column, in the order of the sorted values.

    Raises:
        DataError: there is no example.
    """
    _check_enough(len(groups), 1)
    members = _members(groups)
    return tuple(tuple(members[name]) for name in sorted(members, key=_natural))


def _members(groups: Sequence[str]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


def _natural(name: str) -> tuple[int, int, str]:
    # "2" before "10", numbers before words.
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seeding.derive(seed, "partition"))


def _check_enough(examples: int, clients: int, *, of: str = "") -> None:
    if examples < clients:
        raise DataError(
            f"{examples} training example{'s' * (examples != 1)}{of} cannot be spread over {clients} clients with at "
            "least one each. Use more data or lower partition.clients."
        )


def _feed_empty_clients(shares: list[list[int]]) -> None:
    """Moves one example from the largest share to each empty one: a client without data cannot train."""
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
