"""An iterate of the geometric median, a combination of the updates, with Newton's step from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedeat.geometry.distances import Matrix, Vector

ROUNDING = 2.0**-52


@dataclass(frozen=True)
class State:
    """An iterate `y = sum_i c_i x_i` and what is derived from it.

    Attributes:
        coefficients: (n,) float64, c; they sum to one.
        products: (n,) float64, K c.
        square: c'K c.
        radii: (n,) float64, distances of the updates from y.
        pulls: (n,) float64, prior weight over distance.
        step: (n,) float64, coefficients of Weiszfeld's step; they sum to zero.
        slope: length of the gradient, in 0..1.
    """

    coefficients: Vector
    products: Vector
    square: float
    radii: Vector
    pulls: Vector
    step: Vector
    slope: float


def iterate(gram: Matrix, prior: Vector, coefficients: Vector, radii: Vector | None = None) -> State:
    """The iterate of these coefficients; with distances that were measured, where the products are not as exact."""
    products = gram @ coefficients
    square = float(coefficients @ products)
    if radii is None:
        squares = gram.diagonal() - 2 * products + square
        floor = 4 * ROUNDING * gram.diagonal() + np.finfo(np.float64).tiny
        radii = np.sqrt(np.maximum(squares, floor))
    pulls = prior / radii
    total = float(pulls.sum())
    step = pulls / total - coefficients
    slope = total * math.sqrt(max(0.0, float(step @ (gram @ step))))
    return State(coefficients, products, square, radii, pulls, step, slope)


def newton_direction(gram: Matrix, state: State) -> Vector | None:
    """Coefficients, summing to zero, of the Newton step; None where the Hessian is singular.

    The Hessian is `B (I - sum_i q_i^2 u_i u_i')` with unit vectors u_i towards the clients, B = sum of pulls and
    q_i^2 = pull_i / B, so a step p obeys `p = step + sum_i q_i^2 <u_i, p> u_i`: n equations in t_i = <u_i, p>.
    """
    towards = (gram @ state.step - float(state.products @ state.step)) / state.radii
    root = np.sqrt(state.pulls / state.pulls.sum())
    scale = root / state.radii
    centred = gram - state.products[:, None] - state.products[None, :] + state.square
    system = centred * (-scale[:, None]) * scale[None, :]
    np.fill_diagonal(system, 1 - root * root)
    try:
        solution = np.linalg.solve(system, root * towards)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(solution).all():
        return None
    along = root * solution / state.radii
    direction: Vector = state.step + along - state.coefficients * along.sum()
    return direction
