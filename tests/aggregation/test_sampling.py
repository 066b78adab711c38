"""The sampled geometric median against the exact one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import aggregate, krum
from fedeat.errors import UpdateError


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def secret(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def excess(updates: Tensor, weights: Tensor) -> float:
    point = weights @ updates.double()
    exact = aggregate(updates)
    best = exact.weights @ updates.double()

    def objective(where: Tensor) -> float:
        return float(torch.linalg.vector_norm(updates.double() - where, dim=1).mean())

    return objective(point) / objective(best) - 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["alike", "attacked", "correlated", "shifted", "uneven"])
def test_one_or_two_readings_come_within_a_millionth(kind: str, seed: int) -> None:
    updates = draw(24, 200_000, seed)
    if kind == "attacked":
        updates[:8] *= -30
    elif kind == "correlated":
        updates += 2 * draw(3, 200_000, seed + 50)[torch.arange(24) % 3]
    elif kind == "shifted":
        updates += 5
    elif kind == "uneven":
        updates *= torch.linspace(0, 3, 200_000)
    result = aggregate(updates, sample=secret(seed))
    assert math.isnan(result.gap)
    assert result.passes <= 3
    assert excess(updates, result.weights) <= 1e-6
    torch.testing.assert_close(result.value, (result.weights @ updates.double()).float())


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("together", [True, False])
def test_attackers_hiding_in_single_coordinates_are_found(size: float, together: bool) -> None:
    updates = draw(24, 200_000)
    for client in range(8):
        updates[client, 1234 + (0 if together else client)] = size
    result = aggregate(updates, sample=secret())
    assert excess(updates, result.weights) <= 1e-6
    assert float(result.weights[:8].max()) < 0.6 * float(result.weights[8:].min())


def test_small_or_few_updates_and_optima_at_a_client_are_solved_in_full() -> None:
    assert aggregate(draw(24, 100), sample=secret()).gap < 1e-9
    assert aggregate(draw(5, 200_000), sample=secret()).gap < 1e-9
    updates = draw(24, 200_000)
    updates[12:] = updates[0]
    result = aggregate(updates, sample=secret())
    assert torch.equal(result.value, updates[0])
    assert result.gap < 1e-9


def test_nan_is_still_named() -> None:
    updates = draw(24, 200_000)
    updates[2, 199_999] = math.nan
    with pytest.raises(UpdateError, match="client 2"):
        aggregate(updates, sample=secret())


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_beyond_float32_products_are_solved_in_full(size: float) -> None:
    updates = draw(24, 200_000)
    torch.testing.assert_close(
        aggregate(updates * size, sample=secret()).weights, aggregate(updates).weights, atol=1e-5, rtol=0
    )


def test_lists_of_tensors_are_sampled_alike() -> None:
    updates = draw(24, 200_000)
    rows = [{"a": row[:150_000].reshape(3, -1), "b": row[150_000:]} for row in updates]
    result = aggregate(rows, sample=secret())
    assert excess(updates, result.weights) <= 1e-6


def test_a_sample_for_another_rule_is_refused() -> None:
    with pytest.raises(UpdateError, match="sample"):
        aggregate(draw(5, 10), rule=krum, sample=secret())
