"""How far a geometric median can be from the best one: proofs on the inner products alone.

A proof knows the products as they are. What rounding may have made of these is counted where it could matter: here for
what products cannot tell from zero, in `weighing` for the rounding that measuring left in them.
"""

from __future__ import annotations

import math

import numpy as np

from fedeat.aggregation.iterates import ROUNDING, State, newton_direction
from fedeat.geometry.distances import RESOLUTION, Matrix, Vector

_PROVEN = 1e-12
"""Relative gap so small that no Newton step is spent on proving it smaller."""


def certified_gap(gram: Matrix, prior: Vector, state: State, noise: Vector | None = None) -> tuple[float, float]:
    """Proven bounds of how far the objective is above its minimum: of it all, and of what the nearest half pays.

    Any vectors u_i with |u_i| <= a_i and sum zero prove `minimum >= sum_i <u_i, x_i - y>`. Gradient terms g_i have the
    right length but sum to the gradient s. Moving each along the Newton step p, at right angles to itself, cancels s to
    first order: `u_i = theta (g_i - pull_i p_perp_i - a_i rho)` with the residual rho, and theta <= 1 makes them short
    enough. The second bound is `minimum >= objective - |s| |y - y*|`, with y* no farther than the nearest clients of
    more than half the weight allow.

    Args:
        gram: (n, n) inner products.
        prior: (n,) prior weights, summing to one.
        state: the result; its distances count as exact.
        noise: (n,) lengths such that the product of two clients is wrong by no more than that of their lengths; none
            where the products count as exact.
    """
    noise = np.zeros_like(prior) if noise is None else noise
    objective = float(prior @ state.radii)
    gaps = [_dual_gap(gram, prior, state, np.zeros_like(prior), noise)]
    if gaps[0] > _PROVEN * objective:
        newton = newton_direction(gram, state)
        gaps += [] if newton is None else [_dual_gap(gram, prior, state, newton, noise)]
    order = np.argsort(state.radii)
    paid = np.cumsum((prior * state.radii)[order])
    margin = 2 * np.cumsum(prior[order]) - 1
    slope = math.hypot(state.slope, float(state.pulls.sum()) * float(np.abs(state.step) @ noise)) + 4 * ROUNDING
    bounds = np.where(margin > 1e-12, 2 * slope * paid / (margin + slope), np.inf)
    nearest = float(paid[int(np.argmax(margin > 1e-12))])
    least = min(*gaps, float(bounds.min()))
    return least / objective + 8 * ROUNDING, least / nearest + 8 * ROUNDING


def data_point_gap(gram: Matrix, prior: Vector, point: int, radii: Vector, pulls: Vector, pull: float) -> float:
    """Proven bound of how far the objective at an update is above its minimum, relatively.

    The others' pulls, and their sum scaled down to the weight of the update and its equals, are a dual point. What the
    products cannot tell may lengthen that sum, or move the others, and equals, some way aside.
    """
    norms, same = np.maximum(gram.diagonal(), 0.0), radii == 0
    unseen = RESOLUTION * (norms + norms[point])
    unseen[point] = 0.0
    mass, objective, alike = float(prior[same].sum()), float(radii @ prior), beside(prior, radii, unseen * same)
    if objective == 0:
        return math.inf if alike > 0 else 0.0
    longest = math.hypot(pull, float(pulls @ np.sqrt(unseen)))
    missing, at_most = (1 - mass / max(total, mass) for total in (pull, longest))
    aside = beside(prior, radii, unseen * ~same) / objective
    return min(at_most, missing + aside) + alike / objective + 8 * ROUNDING


def _dual_gap(gram: Matrix, prior: Vector, state: State, move: Vector, noise: Vector) -> float:
    """Objective minus the dual value for the Newton step whose coefficients `move` sum to zero."""

    def length(coefficients: Vector, products: Vector) -> float:
        """The longest that a sum by coefficients that sum to zero may be."""
        return math.sqrt(max(0.0, float(coefficients @ products)) + float(np.abs(coefficients) @ noise) ** 2)

    products = gram @ move
    along = (products - float(state.coefficients @ products)) / state.radii
    # By how much that may be wrong: then the moves are not quite at right angles.
    askew = (noise + float(np.abs(state.coefficients) @ noise)) * float(np.abs(move) @ noise) / state.radii
    least = np.maximum(np.abs(along) - askew, 0.0)
    sideways = np.maximum(length(move, products) ** 2 - least * least, 0.0)
    turned = state.pulls * (1 + along / state.radii)
    # rho = sum_i turned_i (x_i - y) - B p, as coefficients that sum to zero.
    residual = turned - float(turned.sum()) * state.coefficients - float(state.pulls.sum()) * move
    residue = length(residual, gram @ residual)
    shrink = 1 / (math.sqrt(float(((1 + askew / state.radii) ** 2 + sideways / state.radii**2).max())) + residue)
    offset = prior - state.coefficients
    distance = length(offset, gram @ offset)
    return float(prior @ state.radii) * (1 - shrink) + shrink * (residue * distance + float(prior @ askew))


def beside(prior: Vector, radii: Vector, squares: Vector) -> float:
    """What it may add to the objective that updates lie beside where they seem to, by up to the roots of `squares`."""
    aside = np.minimum(np.sqrt(squares), squares / (2 * np.maximum(radii, np.finfo(np.float64).tiny)))
    return float(prior @ aside)


def paid_by_half(prior: Vector, radii: Vector) -> float:
    """What the nearest clients of more than half the weight add to the objective."""
    order = np.argsort(radii)
    return float((prior * radii)[order][: int(np.argmax(2 * np.cumsum(prior[order]) - 1 > 1e-12)) + 1].sum())
