"""What a rule decides on inner products, and what their rounding may have cost a median.

A geometric median's certified gap knows the products only as they were rounded. What the rounding may have cost the
objective is estimated here, and removed by products in float64 or added to the gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation.preaggregation import Step, mixed
from fedeat.aggregation.resilience import shift_invariant, unchained, unwrap
from fedeat.aggregation.rules import Rule
from fedeat.aggregation.weiszfeld import TOLERANCE, ClientWeights, geometric_median
from fedeat.errors import UpdateError
from fedeat.geometry import Geometry
from fedeat.geometry.distances import Matrix, Vector
from fedeat.geometry.layout import UpdateSource
from fedeat.geometry.product_space import Lora, product_gram

_EXCESS = 1e-13
"""Relative objective that rounded products may cost a geometric median before they are formed anew in float64."""
_SAFETY = 8
"""How many times that estimate is added to a certified gap."""
_FLOAT64 = 2.0**-53


def weigh(source: UpdateSource, prior: Tensor, rule: Rule, lora: Lora | None = None) -> tuple[ClientWeights, Geometry]:
    """What a rule decides on the updates' inner products, and those.

    Args:
        source: n updates.
        prior: (n,) float64, summing to one.
        rule: as `aggregate` takes it.
        lora: how to understand factors whose products are measured; None where tensors are measured as they are.

    Raises:
        UpdateError: the updates cannot be measured, or the rule refuses or returns no n finite weights.
    """
    if lora is not None:
        found = product_gram(source, lora)
    else:
        found = geometry.measure(source, prior, origin=not shift_invariant(rule))
    steps, last = unchained(rule)
    function, options = unwrap(last)
    decided = _after_steps(found, prior, steps, cast(Rule, last)) if steps else _decision(rule, found.gram, prior)
    if not steps and function is geometric_median and (lora is not None or found.rounding > 1e-10):
        excess = _rounding_excess(found, prior, decided)
        if excess > _EXCESS and lora is None:
            found = geometry.refine(source, found, prior)
            decided = _decision(rule, found.gram, prior)
        else:
            decided = _widened(decided, excess, options)
    weights = decided.weights.detach().to("cpu", torch.float64).contiguous()
    if weights.shape != prior.shape or not bool(torch.isfinite(weights).all()):
        raise UpdateError(f"the rule must return {len(prior)} finite weights, got {weights}")
    return replace(decided, weights=weights, objective=decided.objective / found.scale), found


def _decision(rule: Rule, gram: Tensor, prior: Tensor) -> ClientWeights:
    decided = rule(gram, prior)
    if not isinstance(decided, ClientWeights):
        raise UpdateError(f"the rule must return ClientWeights, got {type(decided).__name__}")
    return decided


def _after_steps(found: Geometry, prior: Tensor, steps: Sequence[Step], rule: Rule) -> ClientWeights:
    """What a rule decides behind steps; a median's gap knows how exact the products are that these were applied to."""
    function, options = unwrap(rule)
    mixing, gram = mixed(found.gram, prior, steps)
    decided = _decision(rule, gram, mixing.prior_weights)
    weights = mixing.matrix.T @ decided.weights
    if function is geometric_median:
        lengths, rows = np.sqrt(_sizes(found).clip(0)), mixing.matrix.numpy()
        # A squared distance is `v'Kv`, with v what a mixed update is made of less what the result is.
        away = np.abs(rows - weights.numpy())
        noise = found.rounding * (away @ lengths) ** 2
        # Mixing rounds too, and by all that is mixed; an update that is mixed like the result is at distance zero.
        reach = np.abs(rows) @ lengths
        mixing_noise = _FLOAT64 * (reach**2 + float(np.abs(decided.weights.numpy()) @ reach) ** 2)
        noise += np.where(away.any(1), mixing_noise, 0.0)
        squares = _squares(gram.numpy(), decided.weights.numpy())
        decided = _widened(decided, _lost(squares, noise, mixing.prior_weights.numpy()), options)
    return replace(decided, weights=weights)


def _widened(decided: ClientWeights, excess: float, options: Mapping[str, Any]) -> ClientWeights:
    """A geometric median whose gap counts what rounded products may have cost; `options` are the rule's."""
    added = _SAFETY * excess
    if decided.gap > 0:
        larger = 1 + added / decided.gap
        gap, majority_gap = decided.gap * larger, decided.majority_gap * larger
    else:  # all updates seemed to be one
        gap = majority_gap = added
    return replace(decided, gap=gap, majority_gap=majority_gap, converged=gap <= options.get("tolerance", TOLERANCE))


def _rounding_excess(found: Geometry, prior: Tensor, decided: ClientWeights) -> float:
    """How much of the objective, relatively, rounded products may have cost."""
    gram, weights, sizes = found.gram.numpy(), decided.weights.numpy(), _sizes(found)
    chosen = np.flatnonzero(weights)
    if len(chosen) == 1 and found.sizes is None:
        return 0.0
    square = float(weights @ (gram @ weights))
    noise = found.rounding * (sizes + (square if found.sizes is None else float(np.abs(weights) @ sizes)))
    squares = _squares(gram, weights)
    if len(chosen) == 1:
        squares[chosen] = noise[chosen] = 0.0
    return _lost(squares, noise, prior.numpy())


def _lost(squares: Vector, noise: Vector, share: Vector) -> float:
    """How much of the objective, relatively, errors of squared distances from a median may have cost.

    A relative error e_i of client i's distance moves the minimiser by as much as its share of the pulls, which costs
    the objective to second order, `a_i r_i e_i^2`: much only where r_i is small against the products it comes from.
    """
    error = noise / np.maximum(squares, 1e-300)
    radii = np.sqrt(np.maximum(squares, noise))
    paid = float(share @ radii)
    return float(share @ (radii * np.minimum(error, 1.0) ** 2)) / paid if paid > 0 else 0.0


def _squares(gram: Matrix, weights: Vector) -> Vector:
    """Squared distances of all updates from their sum by the weights, as the products tell them."""
    products = gram @ weights
    squares: Vector = gram.diagonal() - 2 * products + float(weights @ products)
    return squares


def _sizes(found: Geometry) -> Vector:
    """Squared lengths whose rounding the products carry."""
    sizes: Vector = (found.gram.diagonal() if found.sizes is None else found.sizes).numpy()
    return sizes
