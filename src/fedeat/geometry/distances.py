"""Distances between updates from their inner products: `|x_i - x_j|^2 = K_ii + K_jj - 2 K_ij`.

Where updates share a large common part this is a small difference of large numbers. What the inner products cannot
resolve counts as zero where equality matters, and as large as it may be where a choice depends on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RESOLUTION = 2.0**-49
"""Squared distances below this part of the squared norms they come from cannot be told from zero."""


def squared_distances(gram: Tensor) -> Tensor:
    """(n, n) float64 squared distances between updates, >= 0, from their inner products.

    What is below the rounding of the inner products counts as zero, so that equal updates are at distance zero.
    """
    sums = _sums(gram)
    distances = sums - 2 * gram
    return distances.masked_fill(distances <= RESOLUTION * sums, 0.0).fill_diagonal_(0.0)


def recentred(gram: Tensor, centre: int) -> Tensor:
    """Inner products of differences to one client's update, from the inner products of the updates."""
    column = gram[:, centre]
    moved = gram - column[:, None] - column[None, :] + gram[centre, centre]
    moved[centre, :] = 0.0
    moved[:, centre] = 0.0
    return moved


def medoid(gram: Tensor, prior_weights: Tensor) -> int:
    """The client with the least weighted sum of distances to all; the first of equals.

    Distances too small for the inner products to tell count as large as they may be: else a group of updates far from
    the reference would look like one point, and better than it is.

    Args:
        gram: (n, n) float64 inner products.
        prior_weights: (n,) float64.
    """
    sums = _sums(gram)
    distances = torch.maximum(sums - 2 * gram, RESOLUTION * sums).fill_diagonal_(0.0)
    return int(torch.argmin(distances.sqrt() @ prior_weights))


def _sums(gram: Tensor) -> Tensor:
    norms = gram.diagonal().clamp_min(0.0)
    return norms[:, None] + norms[None, :]


def cancellation(gram: Tensor, prior_weights: Tensor) -> tuple[float, int]:
    """By how much products exceed the squared distances they are used for, and the medoid.

    The ratio is of medians over the half of the clients nearest to the medoid, so that no minority can raise it.
    """
    distances = squared_distances(gram)
    centre = medoid(gram, prior_weights)
    order = torch.argsort(distances[:, centre], stable=True)
    mass = torch.cumsum(prior_weights[order], 0)
    near = order[: int((mass <= mass[-1] / 2).sum()) + 1]
    size = float(gram.diagonal()[near].median())
    spread = float(distances[:, centre].median())
    if size == 0:
        return 0.0, centre
    return (size / spread if spread > 0 else math.inf), centre
