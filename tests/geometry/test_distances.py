"""Distances from inner products, and what they cannot resolve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedeat.geometry.distances import cancellation, medoid, recentred, squared_distances


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def test_distances_equal_those_of_the_updates() -> None:
    updates = draw(6, 9)
    torch.testing.assert_close(squared_distances(updates @ updates.T), torch.cdist(updates, updates) ** 2)


def test_equal_updates_are_at_distance_zero_despite_rounding() -> None:
    updates = draw(4, 1000) + 1e5
    updates[3] = updates[0]
    distances = squared_distances(updates @ updates.T)
    assert float(distances[0, 3]) == 0.0
    assert bool((distances >= 0).all())


def test_recentred_products_are_those_of_the_differences() -> None:
    updates = draw(5, 7)
    moved = updates - updates[2]
    torch.testing.assert_close(recentred(updates @ updates.T, 2), moved @ moved.T)


def test_the_medoid_has_the_least_sum_of_distances() -> None:
    updates = draw(9, 3)
    assert medoid(updates @ updates.T, prior(9)) == int(torch.cdist(updates, updates).sum(0).argmin())


def test_a_far_group_that_cannot_be_resolved_is_not_preferred() -> None:
    """Two like groups: seen from the first, the second seems to be one point, which would make it the better one."""
    updates = 1e-9 * draw(6, 3)
    updates[3:] += 1
    near = updates - updates[0]
    assert medoid(near @ near.T, prior(6)) < 3


@pytest.mark.parametrize("attackers", [0, 4])
def test_cancellation_compares_common_part_and_spread_of_the_majority(attackers: int) -> None:
    updates = draw(10, 50) + 100
    updates[:attackers] *= 1e9
    ratio, centre = cancellation(updates @ updates.T, prior(10))
    assert centre >= attackers
    assert 1e3 < ratio < 1e5


def test_equal_updates_cancel_completely_unless_zero() -> None:
    ones = torch.ones(3, 4, dtype=torch.float64)
    assert cancellation(ones @ ones.T, prior(3))[0] == math.inf
    assert cancellation(torch.zeros(3, 3, dtype=torch.float64), prior(3))[0] == 0.0
