"""The geometric median over secure aggregation: the server learns sums over clients, never one client's update.

RFA (Pillutla et al., 2022) runs Weiszfeld's smoothed iteration with each client's weight computed by the client: a
round costs one secure sum. Here the iteration stops when its certified gap is small enough, not after a fixed number of
rounds, and a sketch may replace most of them: each client shows a short random projection of its update, the server
finds all weights on the projections at once, and a single secure sum finishes.

Two limits belong to the setting, not to this code. The server cannot check what it cannot see: a client may claim any
weight in a sum, so attackers are bounded only if the secure-sum protocol bounds each contribution's length. And a
sketch of width k shows k linear functions of an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.aggregation.rules import positive
from fedeat.aggregation.weiszfeld import geometric_median
from fedeat.errors import QuorumError, UpdateError


@dataclass(frozen=True)
class Moments:
    """The update, its squared length, and a one: their sums give the mean, the spread and the number of clients."""

    def __call__(self, client: int, update: Tensor) -> Tensor:
        """(d + 2,) float64."""
        values = update.double()
        return torch.cat([values, torch.stack([values @ values, values.new_ones(())])])

    def limits(self, bound: float) -> tuple[float, ...]:
        """Largest size of a coordinate, and of each number behind them, where no update is longer than `bound`."""
        return bound, bound**2, 1.0


@dataclass(frozen=True, eq=False)
class Step:
    """What a client adds to Weiszfeld's step: the unit vector towards its update, its distance, its pull, and a one.

    Attributes:
        point: (d,) float64, where the step begins.
        floor: > 0, distances below it pull as if they were it.
    """

    point: Tensor
    floor: float

    def __call__(self, client: int, update: Tensor) -> Tensor:
        """(d + 3,) float64."""
        offset = update.double() - self.point
        distance = float(torch.linalg.vector_norm(offset))
        pull = 1 / max(distance, self.floor)
        return torch.cat([offset * pull, torch.tensor([distance, pull, 1.0], dtype=torch.float64)])

    def limits(self, bound: float) -> tuple[float, ...]:
        """As of `Moments`."""
        return 1.0, bound + float(torch.linalg.vector_norm(self.point)), 1 / self.floor, 1.0


@dataclass(frozen=True)
class Weighted:
    """The update times a weight that the server found on sketches, and that weight.

    Attributes:
        weights: client -> 0..1.
    """

    weights: Mapping[int, float]

    def __call__(self, client: int, update: Tensor) -> Tensor:
        """(d + 1,) float64."""
        weight = self.weights[client]
        return torch.cat([update.double() * weight, torch.tensor([weight], dtype=torch.float64)])

    def limits(self, bound: float) -> tuple[float, ...]:
        """As of `Moments`."""
        return bound, 1.0


Contribution: TypeAlias = Moments | Step | Weighted
"""(client, its update (d,)) -> vector to be summed; runs on the client. A value, so that it can be sent there."""
SecureSum: TypeAlias = Callable[[Contribution], Tensor]
"""Runs a contribution on every client and returns the sum of the results over clients, nothing else."""

_LEAST_WEIGHT = 0.5
_SKETCH_REPEATS = 4


@dataclass(frozen=True)
class SecureMedian:
    """The aggregate of updates that were never seen.

    Attributes:
        value: (d,) float64.
        sums: how many secure sums were used.
        objective: mean distance of the updates from the last point it was measured at; nan from a sketch.
        gap: certified relative gap of `objective` to its minimum at that point, if clients told the truth; nan from a
            sketch.
        weights: (n,) float64 found on sketches; None where the server never learned any.
        converged: whether the gap is within the tolerance; True from a sketch.
    """

    value: Tensor
    sums: int
    objective: float
    gap: float
    weights: Tensor | None
    converged: bool


def secure_geometric_median(
    secure_sum: SecureSum,
    *,
    tolerance: float = 1e-6,
    smoothing: float = 1e-6,
    max_sums: int = 100,
    sketches: Sequence[Tensor] | None = None,
) -> SecureMedian:
    """Geometric median of the clients' updates from sums over clients alone.

    Without sketches the first sum is the mean; each later one is a Weiszfeld step with `1 / max(nu, r_i)` computed by
    each client, and tells the objective and the gradient at the point that was sent out.

    Args:
        secure_sum: oracle that returns the sum of the clients' contributions.
        tolerance: > 0, certified relative gap at which to stop.
        smoothing: > 0, nu relative to the mean distance from the mean.
        max_sums: >= 2, most secure sums to use.
        sketches: one `sketch` of each client's update, all of one width and seed, in the order of client numbers.

    Raises:
        UpdateError: an option is out of range, a sum is not finite, or sketches do not fit together.
        QuorumError: the clients whose sketches had half of the weight are not in the sum any more.
    """
    positive("tolerance", tolerance)
    positive("smoothing", smoothing)
    if isinstance(max_sums, bool) or not isinstance(max_sums, int) or max_sums < 2:
        raise UpdateError(f"max_sums must be an integer of at least 2, got {max_sums!r}")
    if sketches is not None:
        return _by_sketches(secure_sum, sketches)
    total = _checked(secure_sum(Moments()))
    point = total[:-2] / total[-1]
    length = float(torch.linalg.vector_norm(point))
    spread = math.sqrt(max(float(total[-2] / total[-1]) - length**2, 0.0))
    # The difference of squares is rounded; below this it says nothing.
    nu, gap, objective = smoothing * max(spread, 1e-8 * length), math.inf, math.nan
    for sums in range(2, max_sums + 1):
        total = _checked(secure_sum(Step(point, max(nu, 1e-15 * length, 1e-150))))
        clients, mass, objective = float(total[-1]), float(total[-2]), float(total[-3] / total[-1])
        if objective <= 1e-14 * length:
            # All updates are equal but for rounding.
            return SecureMedian(point, sums, 0.0, 0.0, None, True)
        # |gradient| of the mean distance; the minimiser is at most twice the mean distance away.
        slope = float(torch.linalg.vector_norm(total[:-3])) / clients
        gap = 2 * slope / (1 + slope)
        if gap <= tolerance:
            break
        if sums == 2:
            nu = smoothing * objective
        if sums < max_sums:
            point = point + total[:-3] / mass
            length = float(torch.linalg.vector_norm(point))
    return SecureMedian(point, sums, objective, gap, None, gap <= tolerance)


def secure_mean(secure_sum: SecureSum) -> SecureMedian:
    """Mean of the clients' updates from one sum; no attacker is withstood.

    Raises:
        UpdateError: the sum is not finite.
    """
    total = _checked(secure_sum(Moments()))
    return SecureMedian(total[:-2] / total[-1], 1, math.nan, math.nan, None, True)


def sketch(update: Tensor, *, width: int, seed: int) -> Tensor:
    """A short random projection of an update that keeps distances to about `1 / sqrt(width)` (Kane and Nelson, 2014).

    Each coordinate is added with a random sign to one place of each of four quarters. It is linear, costs O(d), and
    needs no memory beyond one block. An attacker who knows the seed in advance can craft updates whose sketch misleads:
    draw it after the clients have committed to their updates.

    Args:
        update: (d,) float.
        width: a positive multiple of four.
        seed: the round's, equal for all clients.

    Returns:
        (width,) float64.

    Raises:
        UpdateError: `width` is no positive multiple of four, or the update is no vector.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 4 or width % _SKETCH_REPEATS:
        raise UpdateError(f"a sketch's width must be a positive multiple of {_SKETCH_REPEATS}, got {width!r}")
    if update.ndim != 1:
        raise UpdateError(f"a sketch is of one flat update (d,), got shape {tuple(update.shape)}")
    generator = torch.Generator().manual_seed(seed)
    quarter = width // _SKETCH_REPEATS
    total = torch.zeros(_SKETCH_REPEATS, quarter, dtype=torch.float64)
    for block in torch.split(update.detach().cpu(), 1 << 16):
        for row in total:
            places = torch.randint(quarter, (len(block),), generator=generator)
            signs = torch.randint(2, (len(block),), generator=generator) * 2 - 1
            row.index_add_(0, places, block.double() * signs)
    return total.flatten() / math.sqrt(_SKETCH_REPEATS)


def _by_sketches(secure_sum: SecureSum, sketches: Sequence[Tensor]) -> SecureMedian:
    if not sketches or len({tuple(row.shape) for row in sketches}) > 1 or sketches[0].ndim != 1:
        raise UpdateError("sketches must be vectors of one width, one a client; choose one width for all")
    rows = torch.stack([row.double() for row in sketches])
    bad = torch.nonzero(~torch.isfinite(rows).all(1)).flatten().tolist()
    if bad:
        raise UpdateError(f"sketches hold NaN or infinity: {', '.join(f'client {client}' for client in bad)}")
    weights = geometric_median(rows @ rows.T, torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)).weights

    total = _checked(secure_sum(Weighted(dict(enumerate(weights.tolist())))))
    require_weight(float(total[-1]))
    return SecureMedian(total[:-1] / total[-1], 1, math.nan, math.nan, weights, True)


def require_weight(left: float, lost: str = "") -> None:
    """Raises an error where clients that had most of the weight found on sketches are not in the sum.

    Args:
        left: weight of those in it, 0..1.
        lost: who is not, and why, for the end of the message.

    Raises:
        QuorumError: they hold less than half; what they make would be another aggregate, or none.
    """
    if left < _LEAST_WEIGHT:
        raise QuorumError(
            f"the clients in the sum hold {left:.3f} of the weight that the median gave on their sketches, expected at "
            f"least {_LEAST_WEIGHT:g}. Try the round again.{lost}"
        )


def _checked(total: Tensor) -> Tensor:
    if total.ndim != 1 or not bool(torch.isfinite(total).all()):
        raise UpdateError(
            "a secure sum is not a finite vector: some client sent NaN, infinity or another length; the sum cannot "
            "tell which one, so contributions must be checked on the way in"
        )
    return total
