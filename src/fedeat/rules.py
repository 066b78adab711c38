"""Aggregation rules: from the clients' inner products to the clients' weights.

A rule is a function `(gram (n, n) float64, prior_weights (n,) float64) -> ClientWeights`; options are bound with
`functools.partial`. It never sees a tensor of the model, so the same rule serves any adapter in any space. The
geometric median has a module of its own, `weiszfeld`; rules that act on each coordinate are in `coordinatewise`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.errors import UpdateError
from fedeat.geometry import squared_distances
from fedeat.weiszfeld import ClientWeights

Rule: TypeAlias = Callable[[Tensor, Tensor], ClientWeights]
"""`(gram (n, n) float64, prior_weights (n,) float64) -> ClientWeights`."""


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
