"""Aggregation: client updates and a rule in, one update and the record of how it came about out (Alg. 2).

`aggregate` is the whole public call. For each group of tensors it reads the updates once for their inner products
(`geometry`), lets the rule turn these into client weights (`weighing`, `rules`, `weiszfeld`), and reads the updates
once more to combine them (`spaces`). In product space the inner products are those of the true LoRA updates
`s_i B_i A_i - s_g B_g A_g` (`product_space`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from fedeat.aggregation.coordinatewise import coordinate_rule
from fedeat.aggregation.resilience import AnyRule, unchained, unwrap
from fedeat.aggregation.rules import Rule, bounded, trusted_reference
from fedeat.aggregation.spaces import Combination, Part, by_coordinate, in_factors, in_products
from fedeat.aggregation.weiszfeld import ClientWeights, geometric_median
from fedeat.errors import UpdateError
from fedeat.geometry.layout import FACTOR, UpdateSource
from fedeat.geometry.product_space import Lora
from fedeat.geometry.recombination import of_one_rank
from fedeat.geometry.sources import Updates, open_updates
from fedeat.updates import Adapter

Space = Literal["factors", "product"]
Grouping = Literal["model", "layer"]
Value = TypeVar("Value", Tensor, dict[str, Tensor])

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
        passes: how often the updates were read, but for samples and for a quicker way that did not suffice.
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
    columns = coordinate_rule(rule) if callable(rule) else None
    _require_fitting(rule, columns, space, grouping, combine, sample)
    with torch.no_grad():
        everyone = open_updates(updates, any_rank=space == "product" and combine != "factors")
        prior = _prior(prior_weights, len(everyone.labels))
        rule, kept = _judged(rule, prior)
        shares = prior if len(kept) == len(prior) else prior[kept]
        source = everyone if len(kept) == len(prior) else everyone.select(kept)
        treat: Callable[[UpdateSource, Tensor], Part]
        if columns is not None:
            treat, grouping = functools.partial(by_coordinate, columns=columns), "model"
        elif space == "factors":
            treat = functools.partial(in_factors, rule=cast(Rule, rule), sample=sample)
        else:
            scales = _scales(scaling, len(prior), kept)
            whole = reference is None if whole is None else whole
            lora = Lora(reference, _shared(scales, reference_scaling, reference, combine, whole=whole), scales, whole)
            if combine != "recompressed":
                rank = None
            elif rank is None:
                rank = _largest_rank(source)
            treat = functools.partial(in_products, rule=cast(Rule, rule), lora=lora, combine=combine, rank=rank)
        groups = _groups(source, grouping)
        parts = {name: treat(group, shares) for name, group in groups.items()}
        value = _merged(parts)
        if combine == "stacked":
            value = of_one_rank(cast(dict[str, Tensor], value))
    sizes = {name: sum(spec.numel for spec in group.layout.values()) for name, group in groups.items()}
    return _result(parts, sizes, value, kept, len(prior))


def _require_fitting(
    rule: AnyRule,
    columns: object,
    space: Space,
    grouping: Grouping,
    combine: Combination,
    sample: torch.Generator | None,
) -> None:
    """Refuses options that do not exist or do not go together; `columns` is None but for a coordinate-wise rule."""
    _one_of("space", space, ("factors", "product"))
    _one_of("grouping", grouping, ("model", "layer"))
    _one_of("combine", combine, ("factors", "stacked", "recompressed"))
    if not callable(rule):
        raise UpdateError(
            f"rule must be a function, such as fedeat.aggregation.krum, got {rule!r}: pass the function, not its name"
        )
    if space == "factors" and combine != "factors":
        raise UpdateError(f"combine={combine!r} sums products of LoRA factors: choose space='product'")
    if space == "product" and columns is not None:
        raise UpdateError("a coordinate-wise rule has no product space: choose space='factors'")
    if sample is not None and (space != "factors" or unwrap(rule)[0] is not geometric_median):
        raise UpdateError("a sample serves the geometric median in factor space only: leave `sample` out")


def _judged(rule: AnyRule, prior: Tensor) -> tuple[AnyRule, list[int]]:
    """The clients that a rule is to see, and the rule with their numbering.

    A trusted update judges whatever its weight. Its number is that among all clients, the rule's that among those kept.

    Raises:
        UpdateError: a trusted update that is none of the clients, or whose number steps before the rule hide.
    """
    counts = (prior > 0).tolist()
    steps, last = unchained(rule)
    function, options = unwrap(last)
    if steps and function is trusted_reference and not all(counts):
        raise UpdateError(
            "trusted_reference behind steps counts the updates that reach it, but clients of prior weight zero are left"
            " out before: leave them out of the updates, or give them a weight"
        )
    if not steps and function is trusted_reference and "reference" in options:
        trusted = bounded("reference", options["reference"], 0, len(prior) - 1, len(prior))
        counts[trusted] = True
        rule = functools.partial(cast(Any, last), reference=sum(counts[:trusted]))
    return rule, [client for client, counted in enumerate(counts) if counted]


def _groups(source: UpdateSource, grouping: Grouping) -> dict[str, UpdateSource]:
    """The updates' tensors of each group; factors of one LoRA pair are never apart."""
    if grouping == "model":
        return {"": source}
    groups: dict[str, list[str]] = {}
    for name in source.layout:
        layer, factor = _LAYER.match(name), FACTOR.match(name)
        key = layer.group(1) if layer else factor["module"] if factor else name
        groups.setdefault(key, []).append(name)
    return {key: source.restrict(names) for key, names in groups.items()}


def _merged(parts: Mapping[str, Part]) -> Tensor | dict[str, Tensor]:
    """The aggregates of all groups as one of the kind of an update."""
    values = [part.value for part in parts.values()]
    if len(values) == 1:
        return values[0]
    return {name: tensor for value in values for name, tensor in cast(dict[str, Tensor], value).items()}


def _result(
    parts: Mapping[str, Part], sizes: Mapping[str, int], value: Tensor | dict[str, Tensor], kept: list[int], count: int
) -> Aggregate[Any]:
    """One record of what was decided for each group, which has `sizes` coordinates, of the clients kept."""
    groups = {
        name: replace(part.decided, weights=_scatter(part.decided.weights, kept, count)) for name, part in parts.items()
    }
    total = sum(sizes.values())
    shares = [group.weights * (sizes[name] / total) for name, group in groups.items()]
    return Aggregate(
        value=value,
        weights=groups[""].weights if list(groups) == [""] else torch.stack(shares).sum(0),
        iterations=sum(group.iterations for group in groups.values()),
        objective=sum(group.objective for group in groups.values()),
        gap=_worst([group.gap for group in groups.values()]),
        majority_gap=_worst([group.majority_gap for group in groups.values()]),
        converged=all(group.converged for group in groups.values()),
        passes=max(part.passes for part in parts.values()),
        groups=groups,
        discarded=max(part.discarded for part in parts.values()),
    )


def _scatter(weights: Tensor, kept: list[int], count: int) -> Tensor:
    """(count,) weights of all clients, zero of those left out."""
    if len(kept) == count:
        return weights
    everyone = torch.zeros(count, dtype=torch.float64)
    everyone[kept] = weights
    return everyone


def _worst(gaps: Sequence[float]) -> float:
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def _largest_rank(source: UpdateSource) -> int:
    """Of all LoRA factors of all clients."""
    factors = [name for name in source.layout if (match := FACTOR.match(name)) and match["side"] == "A"]
    return max([source.one(i, name).shape[0] for name in factors for i in range(len(source.labels))], default=1)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UpdateError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _scales(scaling: float | Sequence[float], count: int, kept: list[int]) -> list[float]:
    """One scaling for each client kept."""
    scales = [float(scaling)] * count if isinstance(scaling, int | float) else [float(scale) for scale in scaling]
    if len(scales) != count or not all(0 < abs(scale) < math.inf for scale in scales):
        raise UpdateError(f"scaling must be finite and not zero, one number or {count}, got {scaling!r}")
    return [scales[client] for client in kept]


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
