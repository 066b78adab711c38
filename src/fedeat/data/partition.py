"""How examples are spread over clients: evenly, skewed by Dirichlet draws, or by a natural column.

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


def _check_enough(examples: int, clients: int) -> None:
    if examples < clients:
        raise DataError(
            f"{examples} training examples cannot be spread over {clients} clients with at least one each. "
            "Use more data or lower partition.clients."
        )


def _feed_empty_clients(shares: list[list[int]]) -> None:
    """Moves one example from the largest share to each empty one: a client without data cannot train."""
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
