"""The geometric median from sums alone, against the plain one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fedeat.aggregation import aggregate, secure_geometric_median, secure_mean, sketch
from fedeat.aggregation.secure import Contribution, Moments, Step, Weighted
from fedeat.errors import QuorumError, UpdateError


@dataclass
class Oracle:
    """A trusted third party that adds up and remembers only how often it was asked."""

    updates: Tensor
    calls: list[int] = field(default_factory=list)

    def __call__(self, contribution: Contribution) -> Tensor:
        parts = [contribution(client, update) for client, update in enumerate(self.updates)]
        self.calls.append(len(parts[0]))
        return torch.stack(parts).sum(0)


def draw(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def excess(updates: Tensor, point: Tensor) -> float:
    reached = float(torch.linalg.vector_norm(updates - point, dim=1).mean())
    return reached / aggregate(updates).objective - 1


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("attackers", [0, 3])
def test_sums_alone_find_the_median_to_the_tolerance(size: float, attackers: int) -> None:
    updates = draw(10, 40) * size
    updates[:attackers] *= -1e4
    oracle = Oracle(updates)
    result = secure_geometric_median(oracle, tolerance=1e-7)
    assert result.converged
    assert excess(updates, result.value) <= result.gap + 1e-9
    assert result.gap <= 1e-7
    assert result.sums == len(oracle.calls) <= 60
    assert result.weights is None


def test_every_sum_is_as_long_as_an_update_and_a_few_numbers() -> None:
    oracle = Oracle(draw(6, 40))
    secure_geometric_median(oracle)
    assert oracle.calls[0] == 42
    assert set(oracle.calls[1:]) == {43}


def test_the_mean_takes_one_sum() -> None:
    oracle = Oracle(draw(6, 40))
    torch.testing.assert_close(secure_mean(oracle).value, oracle.updates.mean(0))
    assert len(oracle.calls) == 1


def test_no_contribution_exceeds_its_limits() -> None:
    updates = draw(6, 40)
    bound = float(torch.linalg.vector_norm(updates, dim=1).max())
    for contribution in (Moments(), Step(updates.mean(0), 1e-3), Step(updates[0], 1e-3), Weighted({2: 0.7})):
        values = contribution(2, updates[2])
        body, *tail = contribution.limits(bound)
        assert bool((values[: len(values) - len(tail)].abs() <= body).all())
        assert bool((values[len(values) - len(tail) :].abs() <= torch.tensor(tail)).all())


def test_a_budget_of_sums_is_kept_and_the_gap_still_a_bound() -> None:
    updates = draw(10, 5)
    updates[:4] += 30
    oracle = Oracle(updates)
    result = secure_geometric_median(oracle, tolerance=1e-12, max_sums=4)
    assert (result.sums, len(oracle.calls), result.converged) == (4, 4, False)
    assert result.objective / aggregate(updates).objective - 1 <= result.gap / (1 - result.gap)


def test_identical_updates_and_one_client_return_themselves() -> None:
    for count in (1, 4):
        updates = draw(1, 5).repeat(count, 1)
        torch.testing.assert_close(secure_geometric_median(Oracle(updates)).value, updates[0])


def test_sketches_find_the_weights_and_one_sum_finishes() -> None:
    updates = draw(20, 3000)
    updates[:6] *= -50
    oracle = Oracle(updates)
    rows = [sketch(update, width=1024, seed=7) for update in updates]
    result = secure_geometric_median(oracle, sketches=rows)
    assert result.sums == len(oracle.calls) == 1
    assert excess(updates, result.value) < 1e-3
    assert result.weights is not None
    assert float(result.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_sum_without_half_of_the_weight_found_on_sketches_is_no_median(left: int) -> None:
    updates = draw(5, 40)
    rows = [sketch(update, width=64, seed=0) for update in updates]

    def some(contribution: Contribution) -> Tensor:
        parts = [contribution(client, update) for client, update in enumerate(updates)]
        return sum(parts[:left], torch.zeros_like(parts[0]))

    with pytest.raises(QuorumError, match=r"of the weight that the median gave.*at least 0\.5"):
        secure_geometric_median(some, sketches=rows)


def test_wider_sketches_come_closer() -> None:
    updates = draw(12, 4000)
    updates[:4] += 2
    errors = []
    for width in (16, 256, 4096):
        total = 0.0
        for seed in range(5):
            rows = [sketch(update, width=width, seed=seed) for update in updates]
            total += excess(updates, secure_geometric_median(Oracle(updates), sketches=rows).value)
        errors.append(total / 5)
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_a_sketch_is_linear_keeps_norms_and_follows_its_seed() -> None:
    updates = draw(2, 70_000)
    first, second = (sketch(update, width=4096, seed=1) for update in updates)
    torch.testing.assert_close(sketch(updates[0] - 2 * updates[1], width=4096, seed=1), first - 2 * second)
    ratio = float(torch.linalg.vector_norm(first) / torch.linalg.vector_norm(updates[0]))
    assert ratio == pytest.approx(1, abs=0.05)
    assert not torch.equal(first, sketch(updates[0], width=4096, seed=2))


def test_a_broken_sum_is_an_error_that_says_why() -> None:
    updates = draw(5, 4)
    updates[2, 1] = math.nan
    with pytest.raises(UpdateError, match="secure sum is not a finite vector"):
        secure_geometric_median(Oracle(updates))
    with pytest.raises(UpdateError, match="client 2"):
        secure_geometric_median(Oracle(updates), sketches=[sketch(update, width=8, seed=0) for update in updates])


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 0.0},
        {"smoothing": -1.0},
        {"max_sums": 1},
        {"sketches": []},
        {"sketches": [torch.ones(4), torch.ones(8)]},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UpdateError):
        secure_geometric_median(Oracle(draw(3, 4)), **options)


@pytest.mark.parametrize("width", [0, 6, -4, 8.0])
def test_sketches_of_impossible_width_are_refused(width: Any) -> None:
    with pytest.raises(UpdateError, match="multiple of 4"):
        sketch(torch.ones(5), width=width, seed=0)
