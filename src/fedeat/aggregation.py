"""Aggregation: client updates and a rule in, one update and the record of how it came about out (Alg. 2, line 8).

`aggregate` is the whole public call. It reads the updates once for their inner products (`geometry`), lets the rule
turn these into client weights (`rules`, `weiszfeld`), and reads the updates once more to combine them. In product
space the inner products are those of the true LoRA updates `s_i B_i A_i - s_g B_g A_g` (`product_space`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, overload

import torch
from torch import Tensor

from fedeat.coordinatewise import (
    CoordinateRule,
    coordinate_median,
    coordinate_rule,
    mean_around_median,
    trimmed_mean,
)
from fedeat.errors import UpdateError
from fedeat.geometry import Geometry, combine, measure, refine, require_finite
from fedeat.product_space import product_gram
from fedeat.rules import Rule, krum, mean, multi_krum
from fedeat.sources import Updates, UpdateSource, blocks, open_updates
from fedeat.updates import Adapter
from fedeat.weiszfeld import ClientWeights, geometric_median

__all__ = [
    "Aggregate",
    "AnyRule",
    "ClientWeights",
    "CoordinateRule",
    "Rule",
    "Space",
    "aggregate",
    "coordinate_median",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "multi_krum",
    "tolerates",
    "trimmed_mean",
]

Space = Literal["factors", "product"]
AnyRule: TypeAlias = Rule | CoordinateRule | functools.partial[Tensor]
"""A rule on the Gram matrix, a coordinate-wise rule, or a `functools.partial` of either."""
Value = TypeVar("Value", Tensor, dict[str, Tensor])

_EXCESS = 1e-13
"""Relative objective that rounded products may cost a geometric median before they are formed anew in float64."""


@dataclass(frozen=True)
class Aggregate(Generic[Value]):
    """The aggregate of one round, and why it is what it is.

    Attributes:
        value: of the kind, shapes and dtypes of one update.
        weights: (n,) float64, how far each client was believed: the coefficients of the combination, or for a
            coordinate-wise rule the share of coordinates taken from each client. Sums to one, except under rules
            that shorten updates.
        iterations: steps of an iterative rule, else 0.
        objective: what the rule minimises, at its result; nan where it minimises nothing.
        gap: certified relative distance of the objective to its minimum, before rounding `value` to its dtype; nan
            where the rule certifies nothing.
        majority_gap: the same relative to what the nearest half of the clients pay; no minority can inflate it.
        converged: whether the rule reached the tolerance it was asked for.
        passes: how often the updates were read.
    """

    value: Value
    weights: Tensor
    iterations: int
    objective: float
    gap: float
    majority_gap: float
    converged: bool
    passes: int


@overload
def aggregate(
    updates: Tensor | Sequence[Tensor],
    *,
    rule: AnyRule = ...,
    space: Space = ...,
    prior_weights: Tensor | Sequence[float] | None = ...,
    reference: Adapter | None = ...,
    scaling: float | Sequence[float] = ...,
) -> Aggregate[Tensor]: ...
@overload
def aggregate(
    updates: Sequence[Adapter],
    *,
    rule: AnyRule = ...,
    space: Space = ...,
    prior_weights: Tensor | Sequence[float] | None = ...,
    reference: Adapter | None = ...,
    scaling: float | Sequence[float] = ...,
) -> Aggregate[dict[str, Tensor]]: ...
def aggregate(
    updates: Updates,
    *,
    rule: AnyRule = geometric_median,
    space: Space = "factors",
    prior_weights: Tensor | Sequence[float] | None = None,
    reference: Adapter | None = None,
    scaling: float | Sequence[float] = 1.0,
) -> Aggregate[Any]:
    """Aggregates client updates by a rule.

    Args:
        updates: a float tensor (n, d), one row a client; or n tensors of one shape; or n mappings name -> tensor of
            equal names, shapes and dtypes. Never written to, never copied as a whole.
        rule: function `(gram, prior_weights) -> ClientWeights` or a `CoordinateRule`; options through
            `functools.partial`.
        space: "factors" measures distances between the tensors as they are; "product" between the true updates of
            LoRA pairs (tensors named `*.lora_A.weight` (r, k) and `*.lora_B.weight` (d, r)), all else as it is.
        prior_weights: (n,) >= 0, what each client counts before the rule; uniform by default. A client of weight
            zero is left out and its update not looked at.
        reference: product space only: the global adapter that the updates are differences to; None where updates are
            whole adapters.
        scaling: product space only: LoRA's alpha / r, one number or one a client.

    Raises:
        UpdateError: updates that do not fit together, hold NaN or infinity or are out of range, prior weights that
            are negative, not finite or all zero, an option out of range; the message names each client at fault.
    """
    with torch.no_grad():
        source = open_updates(updates)
        prior = _prior(prior_weights, len(source.labels))
        kept = torch.nonzero(prior > 0).flatten()
        if len(kept) < len(prior):
            source = source.select(kept.tolist())
        columns = coordinate_rule(rule)
        if columns is not None:
            if space != "factors":
                raise UpdateError("a coordinate-wise rule has no product space: choose space='factors'")
            value, weights = _by_coordinate(source, prior[kept], columns)
            decided = ClientWeights(weights)
            passes = 1
        else:
            origin = not _translation_invariant(rule)
            if space == "product":
                found = product_gram(source, reference, _scales(scaling, len(prior), kept))
            elif space == "factors":
                found = measure(source, prior[kept], origin=origin)
            else:
                raise UpdateError(f"space must be 'factors' or 'product', got {space!r}")
            decided = cast(Rule, rule)(found.gram, prior[kept])
            if space == "factors" and _is(rule, geometric_median) and _rounding_excess(found, prior[kept], decided):
                found = refine(source, found, prior[kept])
                decided = cast(Rule, rule)(found.gram, prior[kept])
            _check(decided, len(kept))
            value = combine(source, decided.weights, centre=None if space == "product" else found.centre)
            decided = _unscaled(decided, found.scale)
            passes = found.passes + 1
        everyone = torch.zeros(len(prior), dtype=torch.float64)
        everyone[kept] = decided.weights
    return Aggregate(
        value,
        everyone,
        decided.iterations,
        decided.objective,
        decided.gap,
        decided.majority_gap,
        decided.converged,
        passes,
    )


def tolerates(rule: AnyRule, clients: int) -> int:
    """How many arbitrary (Byzantine) updates among `clients` the rule withstands, by its theory.

    A rule with a `byzantine` option withstands what it was told to, at most what its theory allows. For a function this
    package does not know the bound of every rule is returned, ceil(n / 2) - 1.

    Args:
        rule: a rule, or a `functools.partial` of one.
        clients: n >= 1.
    """
    inner, options = _unwrap(rule)
    most = (clients - 1) // 2
    if inner is mean:
        most = 0
    elif inner in (krum, multi_krum):
        most = max(0, (clients - 3) // 2)
    asked = options.get("byzantine")
    if asked is None and inner is trimmed_mean:
        asked = (clients - 1) // 4
    return most if asked is None else min(most, int(asked))


def _unwrap(rule: object) -> tuple[object, Mapping[str, Any]]:
    """The function under any partials, and the keyword options bound on the way."""
    options: dict[str, Any] = {}
    while isinstance(rule, functools.partial):
        options = {**rule.keywords, **options}
        rule = rule.func
    return rule, options


def _is(rule: object, function: Callable[..., object]) -> bool:
    return _unwrap(rule)[0] is function


def _translation_invariant(rule: object) -> bool:
    """Whether the rule's weights stay when all updates are shifted alike, so that any reference will do."""
    return _unwrap(rule)[0] in (mean, geometric_median, krum, multi_krum)


def _prior(prior_weights: Tensor | Sequence[float] | None, count: int) -> Tensor:
    """(n,) float64 prior weights summing to one."""
    if prior_weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    try:
        prior = torch.as_tensor(prior_weights, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UpdateError(f"prior_weights must be {count} numbers, got {prior_weights!r}") from error
    if prior.shape != (count,):
        raise UpdateError(f"prior_weights must have shape ({count},), one number a client, got {tuple(prior.shape)}")
    bad = [f"client {i} has {float(w)}" for i, w in enumerate(prior) if not 0 <= float(w) < math.inf]
    if bad:
        raise UpdateError(f"prior weights must be finite and not negative: {', '.join(bad)}")
    largest = float(prior.max())
    if largest == 0:
        raise UpdateError("prior weights are all zero: at least one client must count")
    prior = prior / largest
    return prior / prior.sum()


def _scales(scaling: float | Sequence[float], count: int, kept: Tensor) -> list[float]:
    """One scaling for each client kept."""
    scales = [float(scaling)] * count if isinstance(scaling, int | float) else [float(scale) for scale in scaling]
    if len(scales) != count or not all(0 < abs(scale) < math.inf for scale in scales):
        raise UpdateError(f"scaling must be finite and not zero, one number or {count}, got {scaling!r}")
    return [scales[client] for client in kept.tolist()]


def _rounding_excess(found: Geometry, prior: Tensor, decided: ClientWeights) -> bool:
    """Whether rounded products may have cost more of the objective than this package wants to lose.

    An error e_i of client i's distance moves the minimiser by as much as its share of the pulls, which costs the
    objective to second order, `a_i r_i e_i^2`: much only where r_i is small against the products it comes from.
    """
    weights = decided.weights
    if int((weights != 0).sum()) == 1 or found.rounding < 1e-10:
        return False
    products = found.gram @ weights
    square = float(weights @ products)
    squares = found.gram.diagonal() - 2 * products + square
    error = found.rounding * (found.gram.diagonal() + square) / squares.clamp_min(1e-300)
    radii = squares.clamp_min(0).sqrt()
    return float((prior * radii * error.clamp(max=1.0) ** 2).sum()) > _EXCESS * float(prior @ radii)


def _check(decided: ClientWeights, count: int) -> None:
    weights = decided.weights
    if weights.shape != (count,) or not bool(torch.isfinite(weights).all()):
        raise UpdateError(f"the rule must return {count} finite weights, got {weights}")


def _unscaled(decided: ClientWeights, scale: float) -> ClientWeights:
    if scale == 1.0:
        return decided
    return ClientWeights(
        decided.weights,
        decided.iterations,
        decided.objective / scale,
        decided.gap,
        decided.majority_gap,
        decided.converged,
    )


def _by_coordinate(
    source: UpdateSource, prior: Tensor, columns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor | dict[str, Tensor], Tensor]:
    """Streams all coordinates through a coordinate-wise rule."""
    layout = source.layout
    value = {name: torch.empty(spec.numel, dtype=spec.dtype, device=source.device) for name, spec in layout.items()}
    shares = torch.zeros(len(source.labels), dtype=torch.float64)
    for segment, block in blocks(source):
        finite = torch.isfinite(block).all(1)
        if not bool(finite.all()):
            require_finite(source, torch.nonzero(~finite).flatten().tolist())
        values, counts = columns(block, prior)
        value[segment.name][segment.start : segment.stop].copy_(values)
        shares += counts.cpu()
    tensors = {name: tensor.reshape(layout[name].shape) for name, tensor in value.items()}
    return source.assemble(tensors), shares / shares.sum()
