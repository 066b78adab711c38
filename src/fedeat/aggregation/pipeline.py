"""Aggregation: client updates and a rule in, one update and the record of how it came about out (Alg. 2).

`aggregate` is the whole public call. It reads the updates once for their inner products (`geometry`), lets the rule
turn these into client weights (`rules`, `weiszfeld`), and reads the updates once more to combine them. In product
space the inner products are those of the true LoRA updates `s_i B_i A_i - s_g B_g A_g` (`product_space`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation.coordinatewise import coordinate_rule
from fedeat.aggregation.preaggregation import Step, mixed
from fedeat.aggregation.resilience import AnyRule, shift_invariant, unchained, unwrap
from fedeat.aggregation.rules import Rule, bounded, trusted_reference
from fedeat.aggregation.sampling import sampled_geometric_median
from fedeat.aggregation.weiszfeld import TOLERANCE, ClientWeights, geometric_median
from fedeat.errors import UpdateError
from fedeat.geometry import Geometry
from fedeat.geometry.distances import Matrix, Vector
from fedeat.geometry.layout import FACTOR, UpdateSource
from fedeat.geometry.product_space import Lora, product_gram
from fedeat.geometry.recombination import of_one_rank, recombine, sum_factors
from fedeat.geometry.sources import Updates, blocks, open_updates
from fedeat.updates import Adapter

Space = Literal["factors", "product"]
Grouping = Literal["model", "layer"]
Combination = Literal["factors", "stacked", "recompressed"]
Value = TypeVar("Value", Tensor, dict[str, Tensor])

_EXCESS = 1e-13
"""Relative objective that rounded products may cost a geometric median before they are formed anew in float64."""
_SAFETY = 8
"""How many times that estimate is added to a certified gap, which knows the products only as they were rounded."""
_FLOAT64 = 2.0**-53
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Aggregate(Generic[Value]):
    """The aggregate of one round, and why it is what it is.

    Attributes:
        value: of the kind, shapes and dtypes of one update; a stacked or recompressed one is a whole adapter.
        weights: (n,) float64, how far each client was believed: the coefficients of the combination, or for a
            coordinate-wise rule the share of coordinates taken from each client. Sums to one, except under rules
            that shorten updates. With one group a layer, the mean over groups by their number of coordinates.
        iterations: steps of an iterative rule, else 0; over all groups.
        objective: what the rule minimises, at its result, summed over groups; nan where it minimises nothing.
        gap: certified relative distance of the objective to its minimum, before rounding `value` to its dtype, the
            worst of all groups; nan where the rule certifies nothing.
        majority_gap: the same relative to what the nearest half of the clients pay; no minority can inflate it.
        converged: whether the rule reached the tolerance it was asked for, in every group.
        passes: how often the updates were read.
        groups: what the rule decided for each group of tensors; one group, "", for the whole model.
        discarded: share of the squared norm that recompression lost, else 0.
    """

    value: Value
    weights: Tensor
    iterations: int
    objective: float
    gap: float
    majority_gap: float
    converged: bool
    passes: int
    groups: Mapping[str, ClientWeights]
    discarded: float = 0.0


@overload
def aggregate(
    updates: Tensor | Sequence[Tensor],
    *,
    rule: AnyRule = ...,
    prior_weights: Tensor | Sequence[float] | None = ...,
    space: Space = ...,
    sample: torch.Generator | None = ...,
) -> Aggregate[Tensor]: ...
@overload
def aggregate(
    updates: Sequence[Adapter] | Sequence[str] | Sequence[Path],
    *,
    rule: AnyRule = ...,
    prior_weights: Tensor | Sequence[float] | None = ...,
    grouping: Grouping = ...,
    space: Space = ...,
    reference: Adapter | None = ...,
    scaling: float | Sequence[float] = ...,
    reference_scaling: float | None = ...,
    whole: bool | None = ...,
    combine: Combination = ...,
    rank: int | None = ...,
    sample: torch.Generator | None = ...,
) -> Aggregate[dict[str, Tensor]]: ...
def aggregate(
    updates: Updates,
    *,
    rule: AnyRule = geometric_median,
    prior_weights: Tensor | Sequence[float] | None = None,
    grouping: Grouping = "model",
    space: Space = "factors",
    reference: Adapter | None = None,
    scaling: float | Sequence[float] = 1.0,
    reference_scaling: float | None = None,
    whole: bool | None = None,
    combine: Combination = "factors",
    rank: int | None = None,
    sample: torch.Generator | None = None,
) -> Aggregate[Any]:
    """Aggregates client updates by a rule.

    Args:
        updates: a float tensor (n, d), one row a client; or n tensors of one shape; or n mappings name -> tensor of
            equal names, shapes and dtypes; or n paths of safetensors files. Never written to, never copied as a whole.
        rule: function `(gram, prior_weights) -> ClientWeights` or a `CoordinateRule`; options through
            `functools.partial`.
        prior_weights: (n,) >= 0, what each client counts before the rule; uniform by default. A client of weight
            zero is left out: its values are not looked at, its names, shapes and dtypes are. A trusted update (see
            `trusted_reference`) judges whatever its weight.
        grouping: "model" weighs whole updates; "layer" each numbered layer by itself, and each tensor outside of
            layers, so that one client may count in some layers and not in others.
        space: "factors" measures distances between the tensors as they are; "product" between the true updates of
            LoRA pairs (tensors named `*.lora_A.weight` (r, k) and `*.lora_B.weight` (d, r)), all else as it is.
        reference: product space only: the round's global adapter; None for zero.
        scaling: product space only: LoRA's alpha / r, one number or one a client.
        reference_scaling: product space only: that of the reference; by default the clients', where they share one.
        whole: product space only: whether updates are whole adapters, which may differ in rank; by default they are
            where there is no reference, else differences to it.
        combine: product space only: "factors" sums factors by the weights, which is of the kind and the scaling of an
            update; of whole adapters, the reference takes what the weights lack to one;
            "stacked" gives the exact weighted sum of products as a whole adapter whose rank is the sum of ranks, of the
            module with the largest: all others are filled with zeros;
            "recompressed" the whole adapter of rank `rank` nearest to that. The last two have one rank and scaling one:
            load them with `lora_alpha` equal to the rank.
        rank: of the recompressed adapter; by default the largest of the updates'.
        sample: geometric median in factor space only: draws the secret coordinates from which weights of large updates
            are found first and then corrected by exact distances (`sampling`). Cheaper with many clients, right to
            5e-7 of the objective or better, without a certificate: the gap is nan unless all products were needed after
            all.

    Raises:
        UpdateError: updates that do not fit together, hold NaN or infinity or are out of range, prior weights that
            are negative, not finite or all zero, an option out of range; the message names each client at fault.
    """
    _one_of("space", space, ("factors", "product"))
    _one_of("grouping", grouping, ("model", "layer"))
    _one_of("combine", combine, ("factors", "stacked", "recompressed"))
    if not callable(rule):
        raise UpdateError(
            f"rule must be a function, such as fedeat.aggregation.krum, got {rule!r}: pass the function, not its name"
        )
    columns = coordinate_rule(rule)
    if space == "factors" and combine != "factors":
        raise UpdateError(f"combine={combine!r} sums products of LoRA factors: choose space='product'")
    if space == "product" and columns is not None:
        raise UpdateError("a coordinate-wise rule has no product space: choose space='factors'")
    if sample is not None and (space != "factors" or unwrap(rule)[0] is not geometric_median):
        raise UpdateError("a sample serves the geometric median in factor space only: leave `sample` out")
    with torch.no_grad():
        everyone = open_updates(updates, any_rank=space == "product" and combine != "factors")
        prior = _prior(prior_weights, len(everyone.labels))
        rule, kept = _judged(rule, prior)
        source = everyone.select(kept.tolist()) if len(kept) < len(prior) else everyone
        if columns is not None:
            value, shares = _by_coordinate(source, prior[kept], columns)
            return _result([("", 1, ClientWeights(shares))], value, kept, len(prior), passes=1)
        lora = None
        if space == "product":
            scales = _scales(scaling, len(prior), kept)
            whole = reference is None if whole is None else whole
            lora = Lora(reference, _shared(scales, reference_scaling, reference, combine, whole=whole), scales, whole)
        if combine == "recompressed" and rank is None:
            rank = max(_ranks(source))
        decisions, values, discarded, passes = [], [], [], 0
        for name, names in _groups(source, grouping).items():
            part = source.restrict(names) if name else source
            quick = None if sample is None else sampled_geometric_median(part, prior[kept], sample)
            point: Tensor | dict[str, Tensor] | None = None
            if quick is not None:
                decided, readings, point = quick
                centre = None
            else:
                decided, found = _weigh(part, prior[kept], cast(Rule, rule), lora)
                centre, readings = found.centre, found.passes
            if point is not None:
                values.append(point)
            elif lora is None:
                values.append(geometry.combine(part, decided.weights, centre=centre))
            elif combine == "factors":
                values.append(sum_factors(part, decided.weights, lora))
            else:
                value, lost = recombine(part, decided.weights, lora, rank=rank if combine == "recompressed" else None)
                values.append(value)
                discarded.append(lost)
            decisions.append((name, sum(part.layout[key].numel for key in part.layout), decided))
            passes = max(passes, readings + (point is None))
        merged = (
            values[0] if len(values) == 1 else {k: t for v in values for k, t in cast(dict[str, Tensor], v).items()}
        )
        if combine == "stacked":
            merged = of_one_rank(cast(dict[str, Tensor], merged))
    return _result(decisions, merged, kept, len(prior), passes=passes, discarded=max(discarded, default=0.0))


def _judged(rule: AnyRule, prior: Tensor) -> tuple[AnyRule, Tensor]:
    """The clients that a rule is to see, and the rule with their numbering.

    A trusted update judges whatever its weight. Its number is that among all clients, the rule's that among those kept.

    Raises:
        UpdateError: a trusted update that is none of the clients, or whose number steps before the rule hide.
    """
    counts = prior > 0
    steps, last = unchained(rule)
    function, options = unwrap(last)
    if steps and function is trusted_reference and not bool(counts.all()):
        raise UpdateError(
            "trusted_reference behind steps counts the updates that reach it, but clients of prior weight zero are left"
            " out before: leave them out of the updates, or give them a weight"
        )
    if not steps and function is trusted_reference and "reference" in options:
        trusted = bounded("reference", options["reference"], 0, len(prior) - 1, len(prior))
        counts[trusted] = True
        rule = functools.partial(cast(Any, last), reference=int(counts[:trusted].sum()))
    return rule, torch.nonzero(counts).flatten()


def _weigh(source: UpdateSource, prior: Tensor, rule: Rule, lora: Lora | None) -> tuple[ClientWeights, Geometry]:
    """What the rule decides on the updates' inner products, and those."""
    if lora is not None:
        found = product_gram(source, lora)
    else:
        found = geometry.measure(source, prior, origin=not shift_invariant(rule))
    steps, last = unchained(rule)
    function, options = unwrap(last)
    decided = _after_steps(found, prior, steps, cast(Rule, last)) if steps else rule(found.gram, prior)
    if not steps and function is geometric_median and (lora is not None or found.rounding > 1e-10):
        excess = _rounding_excess(found, prior, decided)
        if excess > _EXCESS and lora is None:
            found = geometry.refine(source, found, prior)
            decided = rule(found.gram, prior)
        else:
            decided = _widened(decided, excess, options)
    if not isinstance(decided, ClientWeights):
        raise UpdateError(f"the rule must return ClientWeights, got {type(decided).__name__}")
    weights = decided.weights.detach().to("cpu", torch.float64).contiguous()
    if weights.shape != prior.shape or not bool(torch.isfinite(weights).all()):
        raise UpdateError(f"the rule must return {len(prior)} finite weights, got {weights}")
    return replace(decided, weights=weights, objective=decided.objective / found.scale), found


def _after_steps(found: Geometry, prior: Tensor, steps: Sequence[Step], rule: Rule) -> ClientWeights:
    """What a rule decides behind steps; a median's gap knows how exact the products are that these were applied to."""
    function, options = unwrap(rule)
    mixing, gram = mixed(found.gram, prior, steps)
    decided = rule(gram, mixing.prior_weights)
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


def _by_coordinate(
    source: UpdateSource, prior: Tensor, columns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor | dict[str, Tensor], Tensor]:
    """Streams all coordinates through a coordinate-wise rule; the value and each client's share of the coordinates."""
    result = geometry.Assembly(source)
    shares = torch.zeros(len(source.labels), dtype=torch.float64)
    for segments, block in blocks(source):
        finite = torch.isfinite(block).all(1)
        if not bool(finite.all()):
            geometry.require_finite(source, torch.nonzero(~finite).flatten().tolist())
        values, counts = columns(block, prior)
        result.write(segments, values)
        shares += counts.cpu()
    return result.value(), shares / shares.sum()


def _result(
    decisions: Sequence[tuple[str, int, ClientWeights]],
    value: Tensor | dict[str, Tensor],
    kept: Tensor,
    count: int,
    *,
    passes: int,
    discarded: float = 0.0,
) -> Aggregate[Any]:
    """One record of what was decided for each group of (name, coordinates, weights of the clients kept)."""
    coordinates = sum(size for _, size, _ in decisions)
    groups = {name: replace(decided, weights=_scatter(decided.weights, kept, count)) for name, _, decided in decisions}
    weights = torch.zeros(count, dtype=torch.float64)
    for name, size, _ in decisions:
        weights += groups[name].weights * (size / coordinates)
    return Aggregate(
        value=value,
        weights=groups[""].weights if list(groups) == [""] else weights,
        iterations=sum(group.iterations for group in groups.values()),
        objective=sum(group.objective for group in groups.values()),
        gap=_worst([group.gap for group in groups.values()]),
        majority_gap=_worst([group.majority_gap for group in groups.values()]),
        converged=all(group.converged for group in groups.values()),
        passes=passes,
        groups=groups,
        discarded=discarded,
    )


def _groups(source: UpdateSource, grouping: Grouping) -> dict[str, list[str]]:
    """Names of the tensors of each group; factors of one LoRA pair are never apart."""
    names = list(source.layout)
    if grouping == "model":
        return {"": names}
    groups: dict[str, list[str]] = {}
    for name in names:
        layer, factor = _LAYER.match(name), FACTOR.match(name)
        key = layer.group(1) if layer else factor["module"] if factor else name
        groups.setdefault(key, []).append(name)
    return groups


def _scatter(weights: Tensor, kept: Tensor, count: int) -> Tensor:
    everyone = torch.zeros(count, dtype=torch.float64)
    everyone[kept] = weights
    return everyone


def _worst(gaps: Sequence[float]) -> float:
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def _ranks(source: UpdateSource) -> list[int]:
    """Ranks of all LoRA factors of all clients."""
    factors = [name for name in source.layout if (match := FACTOR.match(name)) and match["side"] == "A"]
    return [source.one(i, name).shape[0] for name in factors for i in range(len(source.labels))] or [1]


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UpdateError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _scales(scaling: float | Sequence[float], count: int, kept: Tensor) -> list[float]:
    """One scaling for each client kept."""
    scales = [float(scaling)] * count if isinstance(scaling, int | float) else [float(scale) for scale in scaling]
    if len(scales) != count or not all(0 < abs(scale) < math.inf for scale in scales):
        raise UpdateError(f"scaling must be finite and not zero, one number or {count}, got {scaling!r}")
    return [scales[client] for client in kept.tolist()]


def _shared(
    scales: Sequence[float], given: float | None, reference: Adapter | None, combine: Combination, *, whole: bool
) -> float:
    """The scaling of the reference, by default the clients' own.

    Raises:
        UpdateError: clients have different ones, and the reference's or that of the result would be any of theirs.
    """
    found = ", ".join(map(str, sorted(set(scales))))
    if len(set(scales)) > 1 and combine == "factors":
        raise UpdateError(
            f"clients have the scalings {found}, and no one scaling gives a sum of their factors its meaning: choose "
            f"combine='stacked' or 'recompressed'"
        )
    if len(set(scales)) > 1 and given is None and reference is not None and whole:
        raise UpdateError(f"clients have the scalings {found}: pass the reference's own as reference_scaling")
    return scales[0] if given is None else given


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
