"""RFA's smoothed median between the geometric median and the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedeat.aggregation.smoothed import smoothed_geometric_median
from fedeat.aggregation.weiszfeld import geometric_median


def gram(seed: int = 0, *, attackers: int = 3) -> Tensor:
    updates = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    updates[:attackers] *= 100
    return updates @ updates.T


PRIOR = torch.full((10,), 0.1, dtype=torch.float64)


def test_little_smoothing_is_the_geometric_median_and_much_is_the_mean() -> None:
    exact = geometric_median(gram(), PRIOR)
    torch.testing.assert_close(
        smoothed_geometric_median(gram(), PRIOR, smoothing=1e-9, tolerance=1e-12).weights,
        exact.weights,
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        smoothed_geometric_median(gram(), PRIOR, smoothing=1e9).weights, PRIOR, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("smoothing", [1e-3, 0.3, 3.0])
def test_the_gradient_of_the_smoothed_objective_vanishes(smoothing: float) -> None:
    updates = torch.randn(10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    result = smoothed_geometric_median(updates.detach() @ updates.detach().T, PRIOR, smoothing=smoothing)
    assert result.converged
    distances = torch.cdist(updates.detach(), updates.detach())
    nu = smoothing * float(distances[:, int(distances.sum(0).argmin())].median())
    point = (result.weights @ updates.detach()).requires_grad_()
    radii = torch.linalg.vector_norm(updates.detach() - point, dim=1)
    loss = torch.where(radii >= nu, radii - nu / 2, radii**2 / (2 * nu)).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(result.objective)
    assert point.grad is not None
    assert float(torch.linalg.vector_norm(point.grad)) < 1e-6


def test_too_few_steps_are_not_called_converged() -> None:
    result = smoothed_geometric_median(gram(), PRIOR, max_iterations=2)
    assert (result.iterations, result.converged) == (2, False)
    assert result.gap > 1e-9


def test_smoothing_goes_by_weight_and_not_by_number() -> None:
    """Three of five clients send the same and have less than half of the weight: their place is not the median."""
    aside = torch.tensor([[0.5, 0.75**0.5], [0.5, -(0.75**0.5)]], dtype=torch.float64)
    updates = torch.cat([torch.zeros(3, 2, dtype=torch.float64), aside])
    for share in (0.1, 0.15, 0.165):
        prior = torch.tensor([share] * 3 + [(1 - 3 * share) / 2] * 2, dtype=torch.float64)
        exact = geometric_median(updates @ updates.T, prior)
        found = smoothed_geometric_median(updates @ updates.T, prior)
        assert found.converged
        assert exact.objective == pytest.approx(found.objective, abs=1e-6)
        torch.testing.assert_close(found.weights @ updates, exact.weights @ updates, atol=1e-3, rtol=0)


def test_half_of_the_weight_in_one_place_is_the_median_and_needs_no_step() -> None:
    updates = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    gram = (updates - updates[0]) @ (updates - updates[0]).T
    found = smoothed_geometric_median(gram, torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64))
    assert (found.iterations, found.gap) == (0, 0.0)
    assert torch.equal(found.weights @ updates, updates[0])


def test_equal_updates_need_no_step() -> None:
    ones = torch.ones(10, 4, dtype=torch.float64)
    assert smoothed_geometric_median(ones @ ones.T, PRIOR).iterations == 0
