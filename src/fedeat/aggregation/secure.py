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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.aggregation.rules import positive
from fedeat.aggregation.weiszfeld import geometric_median
from fedeat.errors import UpdateError

Contribution: TypeAlias = Callable[[int, Tensor], Tensor]
"""(client, its update (d,)) -> vector to be summed; runs on the client."""
SecureSum: TypeAlias = Callable[[Contribution], Tensor]
"""Runs a contribution on every client and returns the sum of the results over clients, nothing else."""

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
    """
    positive("tolerance", tolerance)
    positive("smoothing", smoothing)
    if isinstance(max_sums, bool) or not isinstance(max_sums, int) or max_sums < 2:
        raise UpdateError(f"max_sums must be an integer of at least 2, got {max_sums!r}")
    if sketches is not None:
        return _by_sketches(secure_sum, sketches)
    total = _checked(secure_sum(_with_count))
    clients, point = float(total[-1]), total[:-1] / total[-1]
    nu, gap, objective = 0.0, math.inf, math.nan
    for sums in range(2, max_sums + 1):
        total = _checked(secure_sum(_step(point, nu)))
        mass, objective = float(total[-1]), float(total[-2]) / clients
        if objective <= 1e-14 * float(torch.linalg.vector_norm(point)):
            # All updates are equal but for rounding.
            return SecureMedian(point, sums, 0.0, 0.0, None, True)
        following = total[:-2] / mass
        # |gradient| of the mean distance; the minimiser is at most twice the mean distance away.
        slope = mass / clients * float(torch.linalg.vector_norm(following - point))
        gap = 2 * slope / (1 + slope)
        if nu == 0:
            nu = smoothing * objective
        if gap <= tolerance:
            break
        point = following
    return SecureMedian(point, sums, objective, gap, None, gap <= tolerance)


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

    def weighted(client: int, update: Tensor) -> Tensor:
        return update.double() * weights[client]

    return SecureMedian(_checked(secure_sum(weighted)), 1, math.nan, math.nan, weights, True)


def _with_count(client: int, update: Tensor) -> Tensor:
    """The update and a one."""
    return torch.cat([update.double(), torch.ones(1, dtype=torch.float64)])


def _step(point: Tensor, nu: float) -> Contribution:
    """What a client adds to Weiszfeld's step from `point`: its pulled update, its distance, its pull."""

    floor = max(nu, 1e-15 * float(torch.linalg.vector_norm(point)), 1e-150)

    def contribution(client: int, update: Tensor) -> Tensor:
        distance = float(torch.linalg.vector_norm(update.double() - point))
        pull = 1 / max(distance, floor)
        tail = torch.tensor([distance, pull], dtype=torch.float64)
        return torch.cat([update.double() * pull, tail])

    return contribution


def _checked(total: Tensor) -> Tensor:
    if total.ndim != 1 or not bool(torch.isfinite(total).all()):
        raise UpdateError(
            "a secure sum is not a finite vector: some client sent NaN, infinity or another length; the sum cannot "
            "tell which one, so contributions must be checked on the way in"
        )
    return total
