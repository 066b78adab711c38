"""The geometric median of large updates from a secret sample of their coordinates, corrected by exact distances.

For many clients the inner products dominate the cost. Distances on a random sample of the coordinates give weights that
are right to about the square of the sample's error. One exact reading of all coordinates then forms that point and
measures every client's distance from it, which fixes the gradient. Where a Newton step with the sample's curvature has
nothing left to gain, the point is the answer; else the step squares the error again, for another reading.

The coordinates must be drawn after the updates have arrived, by a generator no client can predict: an attacker who knew
them could be huge elsewhere. One who hides in few coordinates anyway is found by the exact distances, which the sample
did not foretell: then, and after three readings, the full inner products are used. Results carry no certificate: the
sample's curvature proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedeat.aggregation.iterates import iterate
from fedeat.aggregation.rough_products import correction, in_range, measurable
from fedeat.aggregation.weiszfeld import ClientWeights, geometric_median
from fedeat.geometry import products
from fedeat.geometry.distances import cancellation, medoid, recentred
from fedeat.geometry.exact_distances import distances_from_sum
from fedeat.geometry.layout import Segment, UpdateSource
from fedeat.geometry.sources import sample

_LEAST_COORDINATES = 65536
_MANY_CLIENTS = 24
_FEW_NUMBERS = 1 << 24
"""Of fewer clients with no more coordinates in all, the products take no longer than drawing a sample does."""
_LENGTH = 1024
_MOST_READINGS = 3
_ENOUGH = 5e-7
"""Estimated relative excess of the objective at which a point that was read exactly is good enough."""
_EXCESS = 1e-8
"""The same of a point one Newton step further, which no reading has seen: a tenth is usual after one reading."""
_MISMATCH = 0.1
"""Relative error of any distance that the sample foretold, up to which it knows enough of all to go on with."""


def sampled_geometric_median(
    source: UpdateSource, prior_weights: Tensor, generator: torch.Generator
) -> tuple[ClientWeights, int, Tensor | dict[str, Tensor] | None] | None:
    """Weights of the geometric median from a sample and a few exact readings, the number of those, and the point.

    Args:
        source: n updates.
        prior_weights: (n,) float64, > 0, summing to one.
        generator: of the secret coordinates.

    Returns:
        The point is None where the weights are of one that no reading has formed yet. All is None where a sample does
        not pay or does not suffice: few coordinates or clients, an optimum at one client's update, values that are not
        finite or out of float32's range, a client far from where the sample saw it, or an estimate that is not small
        after three readings.
    """
    clients, coordinates = len(source.labels), sum(spec.numel for spec in source.layout.values())
    budget = max(_LEAST_COORDINATES, coordinates // 32)
    if 2 * budget > coordinates or (clients < _MANY_CLIENTS and clients * coordinates <= _FEW_NUMBERS):
        return None
    segments = _draw(source, budget, coordinates, generator)
    gram = _sampled_gram(source, segments, None)
    if not in_range(gram, coordinates):
        return None
    ratio, centre = cancellation(gram, prior_weights)
    if ratio > 4:
        gram = _sampled_gram(source, segments, centre)
    gram *= coordinates / sum(segment.stop - segment.start for segment in segments)
    decided = geometric_median(gram, prior_weights)
    weights = decided.weights
    if int((weights != 0).sum()) < min(3, len(weights)):
        return None
    curvature, prior = recentred(gram, medoid(gram, prior_weights)).numpy(), prior_weights.numpy()
    for reading in range(1, _MOST_READINGS + 1):
        guessed = iterate(curvature, prior, weights.numpy())
        distances, point = distances_from_sum(source, weights)
        radii = distances.numpy()
        if not measurable(radii):
            return None
        # Exact distances make the gradient exact, as coefficients; only the curvature is the sample's.
        move, excess = correction(curvature, prior, iterate(curvature, prior, weights.numpy(), radii))
        objective = float(prior @ radii)
        mismatch = float(np.abs(1 - guessed.radii / radii).max())
        if mismatch > _MISMATCH:
            return None
        if excess <= _ENOUGH:
            return ClientWeights(weights, decided.iterations, objective), reading, point
        weights = weights + torch.from_numpy(move)
        if excess * (mismatch**2 + excess) <= _EXCESS:
            return ClientWeights(weights, decided.iterations + reading, objective), reading, None
    return None


def _draw(source: UpdateSource, budget: int, coordinates: int, generator: torch.Generator) -> list[Segment]:
    """Random short segments, as many coordinates of each tensor as its size deserves."""
    segments = []
    for name, spec in source.layout.items():
        share = -(-spec.numel * budget // coordinates)
        length = min(_LENGTH, spec.numel)
        if length == 0:
            continue
        places = torch.randint(spec.numel - length + 1, (-(-share // length),), generator=generator)
        segments += [Segment(name, start, start + length) for start in sorted(places.tolist())]
    return segments


def _sampled_gram(source: UpdateSource, segments: Sequence[Segment], centre: int | None) -> Tensor:
    count = len(source.labels)
    total = torch.zeros(count, count, dtype=torch.float64, device=source.device)
    for rows in sample(source, segments):
        products.accumulate(total, rows, centre=centre)
    return products.mirrored(total)
