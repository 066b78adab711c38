"""Distances between updates from their inner products: `|x_i - x_j|^2 = K_ii + K_jj - 2 K_ij`.

Where updates share a large common part this is a small difference of large numbers. What the inner products cannot
resolve counts as zero where equality matters, and as large as it may be where a choice depends on it.
"""

from __future__ import annotations

import math
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

Vector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
Matrix: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Numbers = TypeVar("Numbers", Vector, Matrix)

RESOLUTION = 2.0**-49
"""Squared distances below this part of the squared norms they come from cannot be told from zero."""


def squared_distances(gram: Tensor) -> Tensor:
    """(n, n) float64 squared distances between updates, >= 0, from their inner products.

    What is below the rounding of the inner products counts as zero, so that equal updates are at distance zero.
    """
    distances = _resolved(*_unresolved(gram.numpy()))
    np.fill_diagonal(distances, 0.0)
    return torch.from_numpy(distances)


def recentred(gram: Tensor, centre: int) -> Tensor:
    """Inner products of differences to one client's update, from the inner products of the updates."""
    products = gram.numpy()
    column = products[:, centre]
    moved = products - column[:, None] - column[None, :] + column[centre]
    moved[centre, :] = 0.0
    moved[:, centre] = 0.0
    return torch.from_numpy(moved)


def medoid(gram: Tensor, prior_weights: Tensor) -> int:
    """The client with the least weighted sum of distances to all; the first of equals.

    Distances too small for the inner products to tell count as large as they may be: else a group of updates far from
    the reference would look like one point, and better than it is.

    Args:
        gram: (n, n) float64 inner products.
        prior_weights: (n,) float64.
    """
    return _medoid(*_unresolved(gram.numpy()), prior_weights.numpy())


def cancellation(gram: Tensor, prior_weights: Tensor) -> tuple[float, int]:
    """By how much products exceed the squared distances they are used for, and the medoid.

    The ratio is of medians over the half of the clients nearest to the medoid, so that no minority can raise it.
    """
    products, prior = gram.numpy(), prior_weights.numpy()
    unresolved, sums = _unresolved(products)
    centre = _medoid(unresolved, sums, prior)
    distances = _resolved(unresolved[:, centre], sums[:, centre])
    distances[centre] = 0.0
    order = np.argsort(distances, kind="stable")
    mass = np.cumsum(prior[order])
    near = order[: int((mass <= mass[-1] / 2).sum()) + 1]
    size = lower_median(products.diagonal()[near])
    spread = lower_median(distances)
    if size == 0:
        return 0.0, centre
    return (size / spread if spread > 0 else math.inf), centre


def lower_median(values: Vector) -> float:
    """The median; of an even number of values the lower of the two in the middle."""
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def _unresolved(products: Matrix) -> tuple[Matrix, Matrix]:
    """Squared distances with whatever rounding made of them, and the sums of squared norms they were taken from."""
    norms = np.maximum(products.diagonal(), 0.0)
    sums = norms[:, None] + norms[None, :]
    return sums - 2 * products, sums


def _resolved(distances: Numbers, sums: Numbers) -> Numbers:
    told: Numbers = np.where(distances <= RESOLUTION * sums, 0.0, distances)
    return told


def _medoid(distances: Matrix, sums: Matrix, prior: Vector) -> int:
    largest = np.maximum(distances, RESOLUTION * sums)
    np.fill_diagonal(largest, 0.0)
    return int(np.argmin(np.sqrt(largest) @ prior))
