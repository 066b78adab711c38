"""The geometric median on the Gram matrix: `argmin_y sum_i a_i |x_i - y|`, solved and certified.

Algorithm 2 of the paper aggregates by the geometric median. Every iterate is a combination `y = sum_i c_i x_i` of
the updates, so the solver carries the coefficients c and reads inner products alone: O(n^2) a Weiszfeld step and
O(n^3) a Newton step, whatever the model's size.

Updates on one line are put in order instead. For all others:

1. Start at the medoid, the best data point. If it is optimal (Vardi and Zhang, 2000: the pull of the others does not
   exceed its own weight), it is the answer, exactly. Else their step leaves it and descends, so that no later iterate
   meets a data point and no distance needs an epsilon.
2. Weiszfeld's steps while each cuts the gradient to a third, then Newton's method in the coefficients, safeguarded by
   them, until it vanishes. That takes a few steps where Weiszfeld alone may need thousands.
3. A dual point proves how far from optimal the result can be at most; see `certificate`.

Objective values are compared by differences of distances, each computed without cancellation, because a single huge
update would otherwise drown what distinguishes the others. The steps run in NumPy, whose calls on tens of numbers cost
a third of torch's: for a million coordinates the solver would else take as long as reading them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedeat.aggregation.certificate import beside, certified_gap, data_point_gap, paid_by_half
from fedeat.aggregation.iterates import ROUNDING, State, iterate, newton_direction
from fedeat.geometry.distances import (
    RESOLUTION,
    Matrix,
    Vector,
    lower_median,
    medoid,
    recentred,
    squared_distances,
)

TOLERANCE = 1e-9
"""Certified relative gap at which a result counts as converged, unless told otherwise."""
_TIE = 1e-13
_CLOSE = 1e-3
"""Slope from which on Newton's steps are the quicker ones wherever Weiszfeld's are quick too."""
_OUTSIDE = 0.01
"""How far below zero a coefficient may fall on the way."""
_NEAR = 1 + 1e-9
"""An objective that much above another's may yet be the same one, rounded."""


@dataclass(frozen=True)
class ClientWeights:
    """What a rule decides, and how it came to it.

    Attributes:
        weights: (n,) float64, the aggregate is `sum_i weights_i x_i`; also the record of how far each client was
            believed.
        iterations: steps of an iterative rule, else 0.
        objective: value of what the rule minimises at its result, in units of the updates; nan for other rules.
        gap: certified upper bound of `objective / optimum - 1`, more exactly of `(objective - optimum) / objective`;
            nan where a rule certifies nothing.
        majority_gap: the same distance to the optimum, relative to the part of the objective that the nearest half
            of the clients pay: huge updates of a minority inflate the objective, not this part. nan as above.
        converged: whether `gap` is within the tolerance asked for; True for rules without iteration.
    """

    weights: Tensor
    iterations: int = 0
    objective: float = math.nan
    gap: float = math.nan
    majority_gap: float = math.nan
    converged: bool = True


def geometric_median(
    gram: Tensor, prior_weights: Tensor, *, tolerance: float = TOLERANCE, max_iterations: int = 100
) -> ClientWeights:
    """Weights of the geometric median of the updates (Alg. 2), with a certificate.

    Where the minimum is not unique, which needs all updates on one line and half of the weight on either side, the
    middle of the two updates that bound the minimisers is returned. Clients of zero prior weight are left out.

    Args:
        gram: (n, n) float64 inner products of the updates, or of their differences to any common reference.
        prior_weights: (n,) float64, >= 0, not all zero.
        tolerance: > 0, certified relative gap to the optimum at which the result counts as converged.
        max_iterations: >= 1, most Newton or Weiszfeld steps.
    """
    counts = prior_weights > 0
    with np.errstate(all="ignore"):  # infinities are compared with, as torch would
        if bool(counts.all()):
            return _solve(gram, prior_weights / prior_weights.sum(), tolerance, max_iterations)
        kept = torch.nonzero(counts).flatten()
        prior = prior_weights[kept] / prior_weights[kept].sum()
        solution = _solve(gram[kept][:, kept], prior, tolerance, max_iterations)
    weights = torch.zeros_like(prior_weights)
    weights[kept] = solution.weights
    return replace(solution, weights=weights)


def _solve(products: Tensor, weights: Tensor, tolerance: float, max_iterations: int) -> ClientWeights:
    gram, prior = products.numpy(), weights.numpy()
    found = _on_a_line(gram, prior, tolerance)
    if found is not None and found.gap <= max(tolerance, TOLERANCE):
        return found
    distances = squared_distances(products).numpy()
    start = medoid(products, weights)
    away = _at_data_point(gram, distances, prior, start, tolerance)
    if isinstance(away, ClientWeights):
        return away
    tried = {start}
    gram = recentred(products, start).numpy()
    state, iterations = _approach(gram, prior, iterate(gram, prior, away), max_iterations)
    while iterations < max_iterations and state.slope > 1e-12:
        nearest = int(np.argmin(state.radii / prior))
        if nearest not in tried and float(np.sqrt(distances[nearest]) @ prior) <= float(prior @ state.radii) * _NEAR:
            # Rounding may have hidden that another data point is the best one; steps towards it would never end.
            tried.add(nearest)
            point = _at_data_point(gram, distances, prior, nearest, tolerance)
            if isinstance(point, ClientWeights) and point.converged:
                return replace(point, iterations=iterations)
        state, finished = _following(gram, prior, state)
        iterations += 1
        if finished:
            break
        if tolerance > 1e-6 and certified_gap(gram, prior, state)[0] <= tolerance:
            break
    gap, majority_gap = certified_gap(gram, prior, state)
    objective = float(prior @ state.radii)
    coefficients = state.coefficients.copy()
    coefficients[start] += 1 - coefficients.sum()  # the products are about that update, so that this moves nothing
    return ClientWeights(torch.from_numpy(coefficients), iterations, objective, gap, majority_gap, gap <= tolerance)


def _approach(gram: Matrix, prior: Vector, state: State, most: int) -> tuple[State, int]:
    """The state after as many of Weiszfeld's steps as each cut the slope to a third, at most `most`, and their number.

    They cost a fifth of Newton's.
    """
    for steps in range(most):
        if state.slope <= _CLOSE:
            return state, steps
        following = iterate(gram, prior, state.coefficients + state.step)
        if not following.slope <= state.slope / 3:  # NaN too
            return state, steps
        state = following
    return state, most


def _following(gram: Matrix, prior: Vector, state: State) -> tuple[State, bool]:
    """The state after a step, and whether that was the last one, for want of digits.

    The step is Newton's, or Weiszfeld's if that is better where Newton's does not descend or not halve the slope.
    """
    noise = 4 * ROUNDING * float(prior @ np.minimum(state.radii, 2 * lower_median(state.radii)))
    candidates = []
    direction = newton_direction(gram, state)
    if direction is not None:
        moved = iterate(gram, prior, state.coefficients + direction * _stride(gram, prior, state, direction))
        candidates = [_convex(gram, prior, moved)]
    changes = [_change(gram, prior, state, other) for other in candidates]
    if not candidates or changes[0] > noise or candidates[0].slope > state.slope / 2:
        candidates.append(iterate(gram, prior, state.coefficients + state.step))
        changes.append(_change(gram, prior, state, candidates[-1]))
    best = min(range(len(candidates)), key=lambda index: changes[index])
    if changes[0] <= changes[best] + noise and candidates[0].slope <= candidates[best].slope:
        best = 0
    following = candidates[best]
    finished = changes[best] > -noise and following.slope > state.slope / 2
    return (state if finished and following.slope >= state.slope else following), finished


def _on_a_line(gram: Matrix, prior: Vector, tolerance: float) -> ClientWeights | None:
    """The median of updates on one line, None where they are on none or are all the same.

    On a line Newton's system is nothing but rounding, and the order of the updates says it all. Where half of the
    weight lies on either side, everything between two updates is optimal: their middle alone depends on nothing but the
    updates themselves.
    """
    norms = np.maximum(gram.diagonal(), 0.0)
    unseen = RESOLUTION * (norms + norms.min())
    places = _places(gram, unseen)
    if places is None:
        return None
    order = np.argsort(places, kind="stable")
    mass = np.cumsum(prior[order]) / prior.sum() - 0.5
    slack = len(prior) * ROUNDING
    low, high = (int(order[int(np.argmax(mass >= least))]) for least in (-slack, slack))
    weights = np.zeros_like(prior)
    weights[low] = 0.5
    weights[low if places[low] == places[high] else high] += 0.5
    radii = np.abs(places - weights @ places)
    objective = float(prior @ radii)
    aside = np.sqrt(2 * unseen)
    aside += max(aside[low], aside[high])
    aside[weights == 1] = 0.0
    excess = beside(prior, radii, aside**2)
    paid = paid_by_half(prior, radii) or objective
    gap, majority_gap = (excess / part + 8 * ROUNDING + slack for part in (objective, paid))
    return ClientWeights(torch.from_numpy(weights), 0, objective, gap, majority_gap, gap <= tolerance)


def _places(gram: Matrix, unseen: Vector) -> Vector | None:
    """Where along a line the updates lie, None where their squared distances from it are more than `unseen`."""
    origin = int(np.argmin(gram.diagonal()))
    column = gram[:, origin]
    squares = gram.diagonal() - column - column + column[origin]
    farthest = int(np.argmax(squares))
    if not squares[farthest] > unseen[farthest]:
        return None
    about = gram[:, farthest] - column - column[farthest] + column[origin]
    about[origin] = 0.0
    places: Vector = about / math.sqrt(squares[farthest])
    return places if (squares - places**2 <= unseen).all() else None


def _at_data_point(
    gram: Matrix, distances: Matrix, prior: Vector, point: int, tolerance: float
) -> ClientWeights | Vector:
    """The data point as the answer if it is optimal, else the coefficients of Vardi and Zhang's step away from it."""
    column = distances[:, point]
    radii = np.sqrt(column)
    same = column == 0
    mass = float(prior[same].sum())
    pulls = np.where(same, 0.0, prior / np.where(same, 1.0, radii))
    centred = recentred(torch.from_numpy(gram), point).numpy()
    pull = math.sqrt(max(0.0, float(pulls @ (centred @ pulls))))
    objective = float(radii @ prior)
    weights = np.zeros_like(prior)
    if pull <= mass * (1 + _TIE):
        weights[point] = 1.0
        if pull >= mass * (1 - _TIE):
            # Nearly on one line and half of the weight on either side: everything between two updates is as good.
            ties = (np.sqrt(distances) @ prior <= objective * (1 + _TIE)) & (radii > 1e-6 * objective)
            if ties.any():
                other = int(np.argmax(np.where(ties, column, -1.0)))
                weights[point], weights[other] = 0.5, 0.5
        gap = data_point_gap(gram, prior, point, radii, pulls, pull)
        return ClientWeights(torch.from_numpy(weights), 0, objective, gap, gap, gap <= tolerance)
    share = mass / pull
    away: Vector = (1 - share) * pulls / pulls.sum() + share * np.where(same, prior, 0.0) / mass
    return away


def _convex(gram: Matrix, prior: Vector, state: State) -> State:
    """The state, or Weiszfeld's step from it where coefficients are negative: the step's are not.

    Near a line many coefficients stand for one point, and Newton's may grow until their rounding moves it. The step is
    never worse than where it began.
    """
    if state.coefficients.min() >= -_OUTSIDE:
        return state
    return iterate(gram, prior, state.pulls / state.pulls.sum())


def _stride(gram: Matrix, prior: Vector, state: State, direction: Vector) -> float:
    """How many times a direction's length to go: 1 near the optimum, else the least objective along the line.

    Between two tight clusters the objective is nearly flat and a plain Newton step covers a small part of the way.
    """
    products = gram @ direction
    length = float(direction @ products)
    along = products - float(state.coefficients @ products)
    squares, floor = state.radii**2, 4 * ROUNDING * state.radii**2

    def slopes(strides: Vector) -> Vector:
        t = strides[:, None]
        radii = np.sqrt(np.maximum(squares - 2 * t * along + t * t * length, floor))
        found: Vector = ((t * length - along) / radii) @ prior
        return found

    ends = slopes(np.array([0.0, 1.0])).tolist()
    if not ends[0] < 0 or abs(ends[1]) <= 0.1 * abs(ends[0]):
        return 1.0
    # The slope grows with the stride: bracket its zero between powers of two, then cut the bracket down.
    strides = 2.0 ** np.arange(-30.0, 61.0)
    for _ in range(3):
        below = int((slopes(strides) < 0).sum())
        low = float(strides[below - 1]) if below > 0 else 0.0
        high = float(strides[min(below, len(strides) - 1)])
        strides = np.linspace(low, high, 17)
    return low if low > 0 else high


def _change(gram: Matrix, prior: Vector, old: State, new: State) -> float:
    """Objective at `new` minus that at `old`, without cancellation between large distances."""
    move = new.coefficients - old.coefficients
    products = gram @ move
    length = float(move @ products)
    squares = length - 2 * (products - float(old.coefficients @ products))
    return float(prior @ (squares / (new.radii + old.radii)))
