"""The geometric median from inner products in half precision, put right and certified by exact distances.

From some tens of clients on, forming the inner products is most of the work, and processors multiply bfloat16 twice as
fast as float32. Products of rounded coordinates give weights that are right to about a millionth, for over many
coordinates the roundings cancel. One exact reading forms that point, measures every client's distance from it, and
thereby fixes the gradient; the products are left to say how the gradient changes. To second order that is enough: the
point is the median to 1e-13 of the objective, or a Newton step and another reading make it so.

How wrong the products are shows in the distances that they foretold. Taken several times as wrong, they go into the
certificate. Where that does not come out, and at a client's own update, the full products are formed after all.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation.rough_products import correction, in_range, measurable
from fedeat.aggregation.weiszfeld import TOLERANCE, ClientWeights, State, certified_gap, geometric_median, iterate
from fedeat.geometry import products
from fedeat.geometry.distances import Vector, cancellation, medoid, recentred
from fedeat.geometry.exact_distances import distances_from_sum
from fedeat.geometry.gram_matrix import sampled_centre
from fedeat.geometry.layout import UpdateSource

_LEAST_CLIENTS = 32
_LEAST_COORDINATES = 1 << 17
"""Of fewer, the roundings do not cancel enough, and there is little time to save."""
_MOST_READINGS = 2
_EXCESS = 1e-13
"""Estimated relative excess of the objective at which a point that was read exactly is the answer."""
_CANCELLATION = 16
"""By how much squared norms may exceed squared distances."""
_SAFETY = 8
"""How many times as wrong as they showed the products are taken to be."""
_DISTANCE_ROUNDING = 2.0**-22
"""Relative error of a distance that was summed in float32 over short pieces."""


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
    coordinates = sum(spec.numel for spec in source.layout.values())
    if not _pays(source, coordinates) or sampled_centre(source, prior_weights, coordinates) is not None:
        return None
    gram = geometry.gram(source, half_precision=True)
    if not in_range(gram, coordinates) or cancellation(gram, prior_weights)[0] > _CANCELLATION:
        return None
    decided = geometric_median(gram, prior_weights, max_iterations=max_iterations)
    weights = decided.weights
    if int((weights != 0).sum()) < 3:
        return None
    lengths = np.sqrt(gram.diagonal().numpy())
    curvature, prior = recentred(gram, medoid(gram, prior_weights)).numpy(), prior_weights.numpy()
    for reading in range(1, _MOST_READINGS + 1):
        foretold = iterate(curvature, prior, weights.numpy())
        distances, point = distances_from_sum(source, weights)
        if not measurable(distances.numpy()):
            return None
        state = iterate(curvature, prior, weights.numpy(), distances.numpy())
        move, excess = correction(curvature, prior, state)
        if excess <= _EXCESS:
            noise = _SAFETY * _error(lengths, foretold, state)
            gap, majority_gap = certified_gap(curvature, prior, state, math.sqrt(noise) * lengths)
            rounding = 1 + _SAFETY * _DISTANCE_ROUNDING**2 / gap
            gap, majority_gap = gap * rounding, majority_gap * rounding
            if gap <= tolerance:
                objective = float(prior @ state.radii)
                return ClientWeights(weights, decided.iterations, objective, gap, majority_gap), reading + 1, point
        weights = weights + torch.from_numpy(move)
    return None


def _pays(source: UpdateSource, coordinates: int) -> bool:
    """Whether the processor forms these products faster in half precision, and there is time to save."""
    singles = all(spec.dtype != torch.float64 for spec in source.layout.values())
    many = len(source.labels) >= _LEAST_CLIENTS and coordinates >= _LEAST_COORDINATES
    return products.HALF_PRECISION and many and singles and source.device.type == "cpu"


def _error(lengths: Vector, foretold: State, measured: State) -> float:
    """Relative error of a product of two clients, as the worst of the foretold distances shows it.

    A squared distance is wrong by twice a sum over all clients of errors that do not know of each other.
    """
    wrong = np.abs(foretold.radii**2 - measured.radii**2)
    usual = 2 * lengths * float(np.linalg.norm(measured.coefficients * lengths))
    return max(_DISTANCE_ROUNDING, float((wrong / usual).max()))
