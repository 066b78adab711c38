"""Rules that act on each coordinate by itself: they see columns of all clients' values, block by block.

They need no inner products, but every value: no matrix of the clients can stand for them. A `CoordinateRule` wraps
such a function so that `aggregate` streams the tensors through it. Beside its values it counts how often each client's
coordinate was used: the audit record that rules on the Gram matrix give through their weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedeat.aggregation.rules import bounded
from fedeat.aggregation.sorting import ranked


@dataclass(frozen=True)
class CoordinateRule:
    """A rule on columns.

    Attributes:
        apply: `(columns (n, c) float, prior_weights (n,) float64) -> (values (c,), shares (n,) float64)`, where shares
            say how many of the c coordinates were taken from each client; they sum to c.
    """

    apply: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, columns: Tensor, prior_weights: Tensor, **options: Any) -> Tensor:
        """(c,) aggregate of the columns."""
        return self.apply(columns, prior_weights, **options)[0]


def coordinate_rule(rule: object) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What to call for each block if `rule` is a coordinate rule or a `functools.partial` of one, else None."""
    if isinstance(rule, CoordinateRule):
        return rule.apply
    if isinstance(rule, functools.partial):
        inner = coordinate_rule(rule.func)
        return functools.partial(inner, *rule.args, **rule.keywords) if inner is not None else None
    return None


def _uniform(prior_weights: Tensor) -> bool:
    return bool((prior_weights == prior_weights[0]).all())


def _counts(chosen: Tensor, count: int, worth: Tensor | None = None) -> Tensor:
    """(n,) float64, how often each client is among the chosen indices, each counting `worth`."""
    worth = None if worth is None else worth.flatten().double()
    return torch.bincount(chosen.flatten(), weights=worth, minlength=count).double()


def _coordinate_median(columns: Tensor, prior_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Median of each coordinate, weighted by the prior weights; the mean of the two middle values where two are."""
    count = len(columns)
    if _uniform(prior_weights):
        middle = ranked(columns, (count - 1) // 2, count // 2)
        below, above = middle[0], middle[-1]
        shares = (_bearers(columns, below) + _bearers(columns, above)) / 2
    else:
        values, order = columns.sort(dim=0)
        mass = torch.cumsum((prior_weights / prior_weights.sum()).to(columns.device)[order], dim=0)
        first = torch.argmax((mass >= 0.5 - 1e-12).to(torch.int8), dim=0, keepdim=True)
        second = torch.argmax((mass > 0.5 + 1e-12).to(torch.int8), dim=0, keepdim=True)
        below, above = values.gather(0, first)[0], values.gather(0, second)[0]
        shares = (_counts(order.gather(0, first), count) + _counts(order.gather(0, second), count)) / 2
    # Halves are summed, not the sum halved: two values near the largest float would overflow.
    return torch.where(below == above, below, below / 2 + above / 2), shares


def _bearers(columns: Tensor, values: Tensor, worth: Tensor | None = None) -> Tensor:
    """(n,) float64, in how many columns the client has that value; clients with the same one share the column.

    Args:
        columns: (n, c).
        values: (c,), each in its column.
        worth: (c,) what a column counts; one where it is not given.
    """
    same = columns == values
    several = same.sum(0)
    if worth is None and bool((several == 1).all()):
        return same.sum(1).double()
    shared = 1 / several.double() if worth is None else worth.double() / several
    return same.double() @ shared


def _trimmed_mean(columns: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean of each coordinate, by prior weight, without its f largest and f smallest values (Yin et al., 2018)."""
    count = len(columns)
    trim = bounded("byzantine", byzantine, (count - 1) // 4, (count - 1) // 2, count)
    if _uniform(prior_weights):
        kept = ranked(columns, trim, count - 1 - trim)
        low, high = kept[0], kept[-1]
        shares = ((columns > low) & (columns < high)).sum(1).double()
        shares += _bearers(columns, low, (kept == low).sum(0))
        shares += _bearers(columns, high, (kept == high).sum(0).masked_fill(low == high, 0))
        return (kept / len(kept)).sum(0), shares / len(kept)
    values, order = columns.sort(dim=0)
    return _weighted(values[trim : count - trim], order[trim : count - trim], prior_weights)


def _mean_around_median(
    columns: Tensor, prior_weights: Tensor, *, byzantine: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of each coordinate, by prior weight, of the n - f values nearest to its median (Xie et al., 2018)."""
    count = len(columns)
    trim = bounded("byzantine", byzantine, (count - 1) // 2, (count - 1) // 2, count)
    middle = _coordinate_median(columns, prior_weights)[0]
    order = (columns - middle).abs().argsort(dim=0, stable=True)[: count - trim]
    return _weighted(columns.gather(0, order), order, prior_weights)


def _weighted(values: Tensor, order: Tensor, prior_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the values by their clients' prior weights, and the share of each client."""
    count = len(prior_weights)
    if _uniform(prior_weights):
        return (values / len(values)).sum(0), _counts(order, count) / len(values)
    parts = prior_weights.to(values.device)[order]
    parts = parts / parts.sum(0)
    return (parts.to(values.dtype) * values).sum(0), _counts(order, count, parts)


coordinate_median = CoordinateRule(_coordinate_median)
"""Median of each coordinate, weighted by the prior weights. Withstands ceil(n/2) - 1 clients."""

trimmed_mean = CoordinateRule(_trimmed_mean)
"""Mean of each coordinate without its `byzantine` largest and smallest values.

`functools.partial(trimmed_mean, byzantine=f)` with 0 <= f <= (n - 1) // 2; by default a quarter, (n - 1) // 4.
"""

mean_around_median = CoordinateRule(_mean_around_median)
"""Mean of the n - f values of each coordinate that are nearest to its median.

`functools.partial(mean_around_median, byzantine=f)` with 0 <= f <= (n - 1) // 2, by default the most.
"""
