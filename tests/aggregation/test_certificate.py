"""Proofs of how far a geometric median is from the best one, where they have the least to go by."""

from __future__ import annotations

import math

import pytest
import torch

from fedeat.aggregation.certificate import certified_gap
from fedeat.aggregation.iterates import iterate
from fedeat.aggregation.weiszfeld import geometric_median


@pytest.mark.parametrize("wrong", [1e-2, 1e-4, 1e-6])
def test_a_gap_that_counts_the_noise_of_products_is_a_bound_where_distances_are_exact(wrong: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for trial in range(60):
        count = 4 + trial % 9
        updates = torch.randn(count, 30, generator=generator, dtype=torch.float64)
        if trial % 3 == 1:
            updates[: (count - 1) // 2] *= 1e6
        elif trial % 3 == 2:
            updates *= torch.rand(count, 1, generator=generator, dtype=torch.float64) ** -2
        gram, lengths = updates @ updates.T, updates.norm(dim=1)
        error = torch.rand(count, count, generator=generator, dtype=torch.float64) * 2 - 1
        noisy = gram + wrong * (error + error.T) / 2 * torch.outer(lengths, lengths)
        prior = torch.full((count,), 1 / count, dtype=torch.float64)
        best = geometric_median(gram, prior)
        # Not the median, but about as near to it as such products would find.
        coefficients = best.weights + wrong * torch.randn(count, generator=generator, dtype=torch.float64) / count
        coefficients /= coefficients.sum()
        radii = (updates - coefficients @ updates).norm(dim=1)
        if float(radii.min()) < 1e-3 * float(radii.median()):
            continue
        state = iterate(noisy.numpy(), prior.numpy(), coefficients.numpy(), radii.numpy())
        gap, majority_gap = certified_gap(noisy.numpy(), prior.numpy(), state, (math.sqrt(wrong) * lengths).numpy())
        excess = float(prior @ radii) - best.objective
        assert excess <= gap * float(prior @ radii) + 1e-14
        assert gap <= majority_gap
