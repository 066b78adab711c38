"""Aggregation rules: from the clients' inner products to the clients' weights.

A rule is a function `(gram (n, n) float64, prior_weights (n,) float64) -> ClientWeights`; options are bound with
`functools.partial`. It never sees a tensor of the model, so the same rule serves any adapter in any space. The
geometric median has a module of its own, `weiszfeld`; rules that act on each coordinate are in `coordinatewise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.aggregation.weiszfeld import ClientWeights
from fedeat.errors import UpdateError
from fedeat.geometry.distances import squared_distances

Rule: TypeAlias = Callable[[Tensor, Tensor], ClientWeights]
"""`(gram (n, n) float64, prior_weights (n,) float64) -> ClientWeights`."""

_MOST_BRANCHES = 100_000


def mean(gram: Tensor, prior_weights: Tensor) -> ClientWeights:
    """The prior weights themselves: federated averaging, which withstands no Byzantine client.

    Args:
        gram: (n, n) float64, only its size counts.
        prior_weights: (n,) float64, >= 0, not all zero.
    """
    return ClientWeights(prior_weights / prior_weights.sum())


def krum(gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> ClientWeights:
    """The one update with the least sum of squared distances to its n - f - 2 nearest (Blanchard et al., 2017).

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64; clients of zero weight are left out, else the weights do not count.
        byzantine: f, 0 <= f <= (n - 3) // 2; by default the most that n clients allow.

    Raises:
        UpdateError: `byzantine` is out of range.
    """
    return multi_krum(gram, prior_weights, byzantine=byzantine, selected=1)


def multi_krum(
    gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None, selected: int | None = None
) -> ClientWeights:
    """The mean, by prior weight, of the updates with the best Krum scores (Blanchard et al., 2017).

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64; clients of zero weight are left out.
        byzantine: f, 0 <= f <= (n - 3) // 2; by default the most that n clients allow.
        selected: how many updates are averaged, 1 <= selected <= n; by default n - f - 2, at least 1.

    Raises:
        UpdateError: an option is out of range.
    """
    kept = torch.nonzero(prior_weights > 0).flatten()
    count = len(kept)
    limit = max(0, (count - 3) // 2)
    byzantine = bounded("byzantine", byzantine, limit, limit, count)
    selected = bounded("selected", selected, max(1, count - byzantine - 2), count, count, least=1)
    ordered = squared_distances(gram[kept][:, kept]).sort(dim=1).values
    # Column 0 is each update's distance to itself.
    scores = ordered[:, 1 : max(2, count - byzantine - 1)].sum(1)
    best = kept[torch.argsort(scores, stable=True)[:selected]]
    weights = torch.zeros_like(prior_weights)
    weights[best] = prior_weights[best] / prior_weights[best].sum()
    return ClientWeights(weights)


def bounded(name: str, value: int | None, default: int, most: int, count: int, *, least: int = 0) -> int:
    """An integer option of a rule, or its default.

    Raises:
        UpdateError: it is not in least..most for this number of clients.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UpdateError(
            f"{name} must be an integer from {least} to {most} with {count} client(s), got {value!r}: "
            f"lower it, or bring more clients into the round"
        )
    return value


def minimum_diameter(gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> ClientWeights:
    """The mean, by prior weight, of the n - f updates whose largest distance is least (El Mhamdi et al., 2018).

    The smallest diameter is found exactly: by bisection over all distances, asking each time whether f clients touch
    every pair that is farther apart. Of several best subsets the first found is taken.

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64; clients of zero weight are left out.
        byzantine: f, 0 <= f <= (n - 1) // 2; by default the most that n clients allow.

    Raises:
        UpdateError: `byzantine` is out of range, or the search is too large (it grows exponentially with f).
    """
    kept = torch.nonzero(prior_weights > 0).flatten()
    count = len(kept)
    byzantine = bounded("byzantine", byzantine, (count - 1) // 2, (count - 1) // 2, count)
    distances = squared_distances(gram[kept][:, kept])
    steps = sorted(set(distances.flatten().tolist()))
    budget = [_MOST_BRANCHES]
    low, high, removed = 0, len(steps) - 1, frozenset[int]()
    while low <= high:
        middle = (low + high) // 2
        far = [frozenset(torch.nonzero(row).flatten().tolist()) for row in distances > steps[middle]]
        cover = _cover(dict(enumerate(far)), byzantine, budget)
        if cover is None:
            low = middle + 1
        else:
            high, removed = middle - 1, cover
    spare = byzantine - len(removed)
    inside = [client for client in range(count) if client not in removed]
    if spare:
        # Fewer clients than f had to go: those farthest from the rest make up the number.
        total = distances[inside][:, inside].sum(1)
        inside = [inside[i] for i in sorted(torch.argsort(total, stable=True)[: len(inside) - spare].tolist())]
    weights = torch.zeros_like(prior_weights)
    weights[kept[inside]] = prior_weights[kept[inside]]
    return ClientWeights(weights / weights.sum())


def _cover(far: dict[int, frozenset[int]], most: int, budget: list[int]) -> frozenset[int] | None:
    """At most `most` clients that touch every pair too far apart, or None where there are none such."""
    budget[0] -= 1
    if budget[0] < 0:
        raise UpdateError(
            f"minimum_diameter gave up after {_MOST_BRANCHES} branches: choose fewer clients, a smaller `byzantine`, "
            f"or geometric_median"
        )
    busiest = max(far, key=lambda client: len(far[client]), default=None)
    if busiest is None or not far[busiest]:
        return frozenset()
    if most == 0 or sum(map(len, far.values())) > 2 * most * len(far[busiest]):
        return None
    choices = [frozenset({busiest})]
    if len(far[busiest]) <= most:
        choices.append(far[busiest])
    for choice in choices:
        rest = {client: others - choice for client, others in far.items() if client not in choice}
        cover = _cover(rest, most - len(choice), budget)
        if cover is not None:
            return cover | choice
    return None


def centred_clipping(gram: Tensor, prior_weights: Tensor, *, radius: float = 1.0, steps: int = 3) -> ClientWeights:
    """Repeated mean of updates clipped to a ball about the last result, from zero (Karimireddy et al., 2021).

    Zero is the round's global adapter, so inner products must be those of the updates themselves. Weights sum to less
    than one where updates were clipped.

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64, >= 0, not all zero.
        radius: > 0, of the ball, relative to the median norm of the updates.
        steps: >= 1.
    """
    positive("radius", radius)
    prior = prior_weights / prior_weights.sum()
    norms = gram.diagonal().clamp_min(0)
    limit = radius * float(norms[prior > 0].sqrt().median())
    weights = torch.zeros_like(prior)
    for _ in range(bounded("steps", steps, 3, 10_000, len(prior), least=1)):
        products = gram @ weights
        distances = (norms - 2 * products + weights @ products).clamp_min(0).sqrt()
        pulls = prior * torch.where(distances > limit, limit / distances, 1.0)
        weights = weights + pulls - weights * pulls.sum()
    return ClientWeights(weights, iterations=steps)


def norm_filter(gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> ClientWeights:
    """The mean, by prior weight, of the n - f shortest updates (comparative gradient elimination, Gupta et al., 2021).

    Args:
        gram: (n, n) float64 inner products of the updates themselves: their norms count.
        prior_weights: (n,) float64; clients of zero weight are left out.
        byzantine: f, 0 <= f <= (n - 1) // 2; by default (n - 1) // 3.

    Raises:
        UpdateError: `byzantine` is out of range.
    """
    kept = torch.nonzero(prior_weights > 0).flatten()
    count = len(kept)
    byzantine = bounded("byzantine", byzantine, (count - 1) // 3, (count - 1) // 2, count)
    best = kept[torch.argsort(gram.diagonal()[kept], stable=True)[: count - byzantine]]
    weights = torch.zeros_like(prior_weights)
    weights[best] = prior_weights[best] / prior_weights[best].sum()
    return ClientWeights(weights)


def trusted_reference(gram: Tensor, prior_weights: Tensor, *, reference: int) -> ClientWeights:
    """Mean of the updates scaled to a trusted one's norm, weighted by their cosine to it (FLTrust, Cao et al., 2021).

    The trusted update is the server's own, trained on data it chose; it judges and is not averaged. Updates at an angle
    of 90 degrees or more count nothing; if all do, the trusted update is the result.

    Args:
        gram: (n, n) float64 inner products of the updates themselves: angles count.
        prior_weights: (n,) float64, >= 0; the trusted update's own does not count.
        reference: row of the trusted update among the rows of `gram`; through `aggregate` its place among all updates,
            whatever their weights.

    Raises:
        UpdateError: `reference` is no row.
    """
    reference = bounded("reference", reference, 0, len(gram) - 1, len(gram))
    norms = gram.diagonal().clamp_min(0).sqrt()
    safe = norms.masked_fill(norms == 0, 1.0)
    trust = prior_weights * (gram[reference] / (safe * safe[reference])).clamp_min(0)
    trust[reference] = 0.0
    if float(trust.sum()) == 0:
        return ClientWeights(torch.nn.functional.one_hot(torch.tensor(reference), len(gram)).double())
    return ClientWeights(trust / trust.sum() * norms[reference] / safe)


def positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UpdateError(f"{name} must be a positive, finite number, got {value!r}")
