"""Pre-aggregation: linear maps of the clients' updates, applied to their Gram matrix before any rule.

A step is a function `(gram (n, n), prior_weights (n,)) -> Mixing`: a matrix M (m, n) that stands for the new updates
`M x`. Their inner products are `M K M'`, and weights w' of the new updates are weights `M' w'` of the clients. So steps
compose with each other and with every rule without reading an update again: `chain(step, ..., rule=rule)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedeat.aggregation.rules import Rule, bounded, positive
from fedeat.aggregation.weiszfeld import ClientWeights
from fedeat.geometry.distances import squared_distances


@dataclass(frozen=True)
class Mixing:
    """Updates made of updates.

    Attributes:
        matrix: (m, n) float64, one row for each new update.
        prior_weights: (m,) float64, what each new update counts.
    """

    matrix: Tensor
    prior_weights: Tensor


Step: TypeAlias = Callable[[Tensor, Tensor], Mixing]
"""`(gram (n, n) float64, prior_weights (n,) float64) -> Mixing`; options through `functools.partial`."""


def chain(*steps: Step, rule: Rule) -> functools.partial[ClientWeights]:
    """A rule that first applies the steps, in order.

    Args:
        steps: any number of pre-aggregation steps.
        rule: the rule applied to what they leave.
    """
    return functools.partial(chained, steps=steps, rule=rule)


def chained(gram: Tensor, prior_weights: Tensor, *, steps: Sequence[Step], rule: Rule) -> ClientWeights:
    """Weights of the clients under a rule applied after pre-aggregation steps; see `chain`.

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64, >= 0, not all zero.
        steps: applied first to last.
        rule: applied to what the steps leave.
    """
    mixing, products = mixed(gram, prior_weights, steps)
    decided = rule(products, mixing.prior_weights)
    return replace(decided, weights=mixing.matrix.T @ decided.weights)


def mixed(gram: Tensor, prior_weights: Tensor, steps: Sequence[Step]) -> tuple[Mixing, Tensor]:
    """What steps, applied first to last, make of the updates, and the (m, m) inner products of that."""
    total = torch.eye(len(gram), dtype=torch.float64)
    for step in steps:
        mixing = step(gram, prior_weights)
        gram = mixing.matrix @ gram @ mixing.matrix.T
        gram = (gram + gram.T) / 2
        total, prior_weights = mixing.matrix @ total, mixing.prior_weights
    return Mixing(total, prior_weights), gram


def nearest_neighbour_mixing(gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> Mixing:
    """Replaces each update by the mean of its n - f nearest, itself included (Allouah et al., 2023).

    Args:
        gram: (n, n) float64 inner products of the updates.
        prior_weights: (n,) float64; a mean is by prior weight.
        byzantine: f, 0 <= f <= (n - 1) // 2, by default the most.

    Raises:
        UpdateError: `byzantine` is out of range.
    """
    count = len(gram)
    byzantine = bounded("byzantine", byzantine, (count - 1) // 2, (count - 1) // 2, count)
    near = torch.argsort(squared_distances(gram), dim=1, stable=True)[:, : count - byzantine]
    matrix = torch.zeros_like(gram).scatter_(1, near, prior_weights[near])
    return Mixing(matrix / matrix.sum(1, keepdim=True), prior_weights)


def bucketing(gram: Tensor, prior_weights: Tensor, *, generator: torch.Generator, size: int = 2) -> Mixing:
    """Replaces the updates by means of random buckets (Karimireddy et al., 2022).

    Args:
        gram: (n, n) float64, only its size counts.
        prior_weights: (n,) float64; a bucket's mean is by prior weight, and it counts their sum.
        generator: of the permutation; it must advance from round to round.
        size: 1 <= size <= n, updates in a bucket; the last may hold fewer.

    Raises:
        UpdateError: `size` is out of range.
    """
    count = len(gram)
    size = bounded("size", size, 2, count, count, least=1) if count > 1 else 1
    order = torch.randperm(count, generator=generator)
    matrix = torch.zeros(-(-count // size), count, dtype=torch.float64)
    matrix[torch.arange(count) // size, order] = prior_weights[order]
    mass = matrix.sum(1)
    return Mixing(matrix / mass[:, None], mass)


def norm_clipping(gram: Tensor, prior_weights: Tensor, *, radius: float = 1.0) -> Mixing:
    """Shortens updates to a largest norm.

    Args:
        gram: (n, n) float64 inner products of the updates themselves: their norms count.
        prior_weights: (n,) float64.
        radius: > 0, the largest norm, relative to the median norm.

    Raises:
        UpdateError: `radius` is not positive.
    """
    positive("radius", radius)
    norms = gram.diagonal().clamp_min(0).sqrt()
    return _shorten(norms, radius * float(norms.median()), prior_weights)


def adaptive_clipping(gram: Tensor, prior_weights: Tensor, *, byzantine: int | None = None) -> Mixing:
    """Shortens the k longest updates to the norm of the next, k = floor(2 f (n - f) / n) (ARC, Allouah et al., 2025).

    Args:
        gram: (n, n) float64 inner products of the updates themselves: their norms count.
        prior_weights: (n,) float64.
        byzantine: f, 0 <= f <= (n - 1) // 2, by default the most.

    Raises:
        UpdateError: `byzantine` is out of range.
    """
    count = len(gram)
    byzantine = bounded("byzantine", byzantine, (count - 1) // 2, (count - 1) // 2, count)
    norms = gram.diagonal().clamp_min(0).sqrt()
    longest = 2 * byzantine * (count - byzantine) // count
    return _shorten(norms, float(norms.sort(descending=True).values[longest]), prior_weights)


def _shorten(norms: Tensor, limit: float, prior_weights: Tensor) -> Mixing:
    factors = torch.where(norms > limit, limit / norms.masked_fill(norms == 0, 1.0), 1.0)
    return Mixing(torch.diag(factors), prior_weights)
