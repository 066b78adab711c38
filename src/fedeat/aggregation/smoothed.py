"""RFA's smoothed geometric median on the Gram matrix (Pillutla et al., 2022), for comparison with the exact one.

Smoothing removes the kink at each update: distances below nu count by their square. With a large nu it is the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedeat.aggregation.weiszfeld import ClientWeights
from fedeat.geometry.distances import medoid, recentred, squared_distances


def smoothed_geometric_median(
    gram: Tensor,
    prior_weights: Tensor,
    *,
    smoothing: float = 1e-6,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> ClientWeights:
    """Weights of RFA's smoothed geometric median (Pillutla et al., 2022): distances below nu count squared.

    Weiszfeld's step with `a_i / max(nu, r_i)`, from the medoid until the certified gap of the smoothed objective
    `sum_i a_i (r_i - nu / 2 if r_i >= nu else r_i^2 / (2 nu))` is small enough.

    Args:
        gram: (n, n) float64 inner products of the updates, or of their differences to any common reference.
        prior_weights: (n,) float64, >= 0, not all zero.
        smoothing: > 0, nu relative to the median distance from the medoid, by prior weight, so that scale does not
            matter.
        tolerance: > 0, certified relative gap of the smoothed objective at which to stop.
        max_iterations: >= 1.
    """
    prior = prior_weights / prior_weights.sum()
    distances = squared_distances(gram)
    start = medoid(gram, prior)
    weights = torch.zeros_like(prior)
    weights[start] = 1.0
    nu = smoothing * _median(distances[:, start].sqrt(), prior)
    gram = recentred(gram, start)
    if nu == 0:  # half of the weight is there, and the rest cannot pull it away
        return ClientWeights(weights, 0, float(distances[:, start].sqrt() @ prior), 0.0, 0.0)
    objective = gap = math.inf
    for iterations in range(max_iterations + 1):
        products = gram @ weights
        squares = gram.diagonal() - 2 * products + weights @ products
        radii = squares.clamp_min(0).sqrt()
        pulls = prior / radii.clamp_min(nu)
        step = pulls / pulls.sum() - weights
        slope = float(pulls.sum()) * math.sqrt(max(0.0, float(step @ (gram @ step))))
        objective = float(prior @ torch.where(radii >= nu, radii - nu / 2, radii**2 / (2 * nu)))
        # The minimiser lies in the convex hull of the updates, so no farther than the farthest of them.
        gap = slope * float(radii[prior > 0].max()) / objective + 2.0**-49
        if gap <= tolerance or iterations == max_iterations:
            break
        weights = weights + step
    return ClientWeights(weights, iterations, objective, gap, math.nan, gap <= tolerance)


def _median(values: Tensor, prior: Tensor) -> float:
    """The least value that half of the weight does not exceed."""
    ordered, order = values.sort()
    below = int((prior[order].cumsum(0) < 0.5 - len(prior) * 2.0**-52).sum())
    return float(ordered[below])
