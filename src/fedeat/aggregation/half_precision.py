"""The geometric median from inner products in half precision, put right and certified by exact distances.

From some tens of clients on, forming the inner products is most of the work, and processors multiply bfloat16 twice as
fast as float32. Products of rounded coordinates give weights that are right to about a millionth, for over many
coordinates the roundings cancel. One exact reading forms that point, measures every client's distance from it, and
thereby fixes the gradient; the products are left to say how the gradient changes. To second order that is enough: the
point is the median to 2e-13 of the objective, or a Newton step and another reading make it so.

How wrong the products are shows where some are formed without rounding too: those with one client, the medoid of a
sample. Taken several times as wrong, and all of them to the worse, they go into the certificate. Where that does not
come out, and at a client's own update, the full products are formed after all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedeat.aggregation.certificate import certified_gap
from fedeat.aggregation.iterates import iterate
from fedeat.aggregation.rough_products import correction, in_range, measurable
from fedeat.aggregation.weiszfeld import TOLERANCE, ClientWeights, geometric_median
from fedeat.geometry import products
from fedeat.geometry.distances import cancellation, medoid, recentred
from fedeat.geometry.exact_distances import distances_from_sum
from fedeat.geometry.gram_matrix import half_gram, sampled_cancellation
from fedeat.geometry.layout import UpdateSource

_LEAST_CLIENTS = 40
_LEAST_COORDINATES = 1 << 17
"""Of fewer, the roundings do not cancel enough, and there is little time to save."""
_MOST_READINGS = 2
_EXCESS = 2e-13
"""Estimated relative excess of the objective at which a point that was read exactly is the answer."""
_CANCELLATION = 4
"""By how much squared norms may exceed squared distances: more would leave too little of the products' digits."""
_SAFETY = 4
"""How many times the largest error that showed all products are taken to be wrong by, all of them to the worse."""
_ROUNDING = 2.0**-22
"""Relative error of what is summed in float32 over short pieces."""


def half_precision_median(
    source: UpdateSource, prior_weights: Tensor, *, tolerance: float = TOLERANCE, max_iterations: int = 100
) -> tuple[ClientWeights, int, Tensor | dict[str, Tensor]] | None:
    """The geometric median, the number of readings it took, and the point itself.

    Args:
        source: n updates.
        prior_weights: (n,) float64, > 0, summing to one.
        tolerance: as `geometric_median`.
        max_iterations: as `geometric_median`.

    Returns:
        None where half precision does not pay or does not suffice: on processors without it, for few clients or
        coordinates, updates that are not finite, out of range, on one line, or much longer than their differences, or
        an optimum at one client's update.
    """
    if not _pays(source):
        return None
    coordinates = sum(spec.numel for spec in source.layout.values())
    ratio, middle = sampled_cancellation(source, prior_weights)
    if ratio > _CANCELLATION:
        return None
    gram, error = half_gram(source, middle)
    if not in_range(gram, coordinates) or not error < 1 or cancellation(gram, prior_weights)[0] > 2 * _CANCELLATION:
        return None
    decided = geometric_median(gram, prior_weights, max_iterations=max_iterations)
    weights = decided.weights
    if int((weights != 0).sum()) < 3:
        return None
    noise = np.sqrt(_SAFETY * max(error, _ROUNDING) * gram.diagonal().numpy())
    curvature, prior = recentred(gram, medoid(gram, prior_weights)).numpy(), prior_weights.numpy()
    for reading in range(1, _MOST_READINGS + 1):
        distances, point = distances_from_sum(source, weights)
        if not measurable(distances.numpy()):
            return None
        state = iterate(curvature, prior, weights.numpy(), distances.numpy())
        move, excess = correction(curvature, prior, state)
        if excess <= _EXCESS:
            gap, majority_gap = certified_gap(curvature, prior, state, noise)
            rounding = 1 + _SAFETY * _ROUNDING**2 / gap
            gap, majority_gap = gap * rounding, majority_gap * rounding
            if gap <= tolerance:
                objective = float(prior @ state.radii)
                return ClientWeights(weights, decided.iterations, objective, gap, majority_gap), reading + 1, point
        weights = weights + torch.from_numpy(move)
    return None


def _pays(source: UpdateSource) -> bool:
    """Whether the processor forms these products faster in half precision, and there is time to save."""
    return (
        products.HALF_PRECISION
        and len(source.labels) >= _LEAST_CLIENTS
        and sum(spec.numel for spec in source.layout.values()) >= _LEAST_COORDINATES
        and all(spec.dtype != torch.float64 for spec in source.layout.values())
        and source.device.type == "cpu"
    )
