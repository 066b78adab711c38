"""What is known of this package's rules: how many attackers each withstands, whether shifts matter, what fewer need.

The number is the rule's by its theory, for a configuration to be refused before training rather than fail in it. That a
rule withstands attackers means that they move its result by a bounded length. Which way it then points is another
question, and depends on how far apart the honest updates are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from fedeat.aggregation.coordinatewise import CoordinateRule, trimmed_mean
from fedeat.aggregation.preaggregation import Step, bucketing, chained, nearest_neighbour_mixing
from fedeat.aggregation.rules import (
    Rule,
    centred_clipping,
    krum,
    mean,
    minimum_diameter,
    multi_krum,
    norm_filter,
    trusted_reference,
)
from fedeat.aggregation.smoothed import smoothed_geometric_median
from fedeat.aggregation.weiszfeld import geometric_median

AnyRule: TypeAlias = Rule | CoordinateRule | functools.partial[Any]
"""A rule on the Gram matrix, a coordinate-wise rule, or a `functools.partial` of either."""

_SHIFT_INVARIANT = (mean, geometric_median, smoothed_geometric_median, krum, multi_krum, minimum_diameter)
_SHIFT_INVARIANT_STEPS = (nearest_neighbour_mixing, bucketing)


def tolerates(rule: AnyRule, clients: int) -> int:
    """How many arbitrary (Byzantine) updates among `clients` the rule withstands, by its theory.

    A rule with a `byzantine` option withstands what it was told to, at most what its theory allows, and `multi_krum` no
    more than it leaves out. Of a function this package does not know it knows nothing: it returns ceil(n / 2) - 1, the
    bound of every rule, which the function may be far from. `trusted_reference` alone withstands more: all but the
    server's own update.

    Args:
        rule: a rule, or a `functools.partial` of one.
        clients: n >= 1.
    """
    inner, options = unwrap(rule)
    if inner is chained:
        return _chain_tolerates(options, clients)
    most, asked = (clients - 1) // 2, options.get("byzantine")
    if inner is mean:
        most = 0
    elif inner in (krum, multi_krum):
        most = max(0, (clients - 3) // 2)
        if options.get("selected") is not None:
            most = max(0, min(most, clients - int(options["selected"])))
    elif inner is centred_clipping:
        most = clients // 10
    elif inner is norm_filter:
        most = (clients - 1) // 3
    elif inner is trusted_reference:
        most = clients - 1
    elif inner is trimmed_mean and asked is None:
        asked = (clients - 1) // 4
    return most if asked is None else min(most, int(asked))


def turning_share(spread: float) -> float:
    """Share of attackers of one mind from which on they turn the geometric median back against the honest mean.

    Anywhere opposite to the honest mean, near or far, they pull the median by their share a; honest updates pull the
    other way by no more than the cosine between them and their mean: `resting_place` falls below zero from
    `a = 1 / (1 + sqrt(1 + spread^2))` on.

    Args:
        spread: >= 0, root mean square distance of the honest updates from their mean, over the mean's length.

    Returns:
        In (0, 0.5]: one half where honest updates agree, the rule's breakdown point.
    """
    return 1 / (1 + math.hypot(1.0, spread))


def resting_place(share: float, spread: float) -> float:
    """Where attackers of one mind, opposite to the honest mean, leave the geometric median, in lengths of that mean.

    `1 - spread * b / sqrt(1 - b^2)` with `b = share / (1 - share)`, where honest updates differ from their mean at
    right angles and by one length, as in many dimensions they nearly do, and the attackers stand beyond the median.

    Args:
        share: of the attackers, in [0, 0.5).
        spread: as `turning_share` takes it.

    Returns:
        1 for the honest mean, 0 for no step at all, below zero for a step back.
    """
    pull = share / (1 - share)
    return 1 - spread * pull / math.sqrt(1 - pull**2)


def shift_invariant(rule: AnyRule) -> bool:
    """Whether the weights stay when all updates are shifted alike; False for a function this package does not know."""
    steps, rule = unchained(rule)
    return all(unwrap(step)[0] in _SHIFT_INVARIANT_STEPS for step in steps) and unwrap(rule)[0] in _SHIFT_INVARIANT


def unwrap(rule: object) -> tuple[object, Mapping[str, Any]]:
    """The function under any partials, and the keyword options bound on the way."""
    options: dict[str, Any] = {}
    while isinstance(rule, functools.partial):
        options = {**rule.keywords, **options}
        rule = rule.func
    return rule, options


def unchained(rule: AnyRule) -> tuple[list[Step], AnyRule]:
    """All steps before a rule, first to last, and the rule itself; no steps where it is no chain."""
    steps: list[Step] = []
    function, options = unwrap(rule)
    while function is chained:
        steps += options["steps"]
        rule = options["rule"]
        function, options = unwrap(rule)
    return steps, rule


def fitted(rule: Any, updates: int) -> Any:
    """A rule, or a step before one, as it can be had with fewer updates than it was meant for.

    Rejections leave it less to withstand, to select and to put into a bucket.

    Args:
        rule: options that count updates (`byzantine`, `selected`, `size`) are lowered to what `updates` allow.
        updates: n >= 1.
    """
    if not isinstance(rule, functools.partial):
        return rule
    options = dict(rule.keywords)
    if rule.func is chained:
        rows, steps = updates, []
        for step in options["steps"]:
            steps.append(fitted(step, rows))
            inner, bound = unwrap(steps[-1])
            rows = -(-rows // (bound.get("size") or 2)) if inner is bucketing else rows
        options |= {"steps": steps, "rule": fitted(options["rule"], rows)}
    if options.get("byzantine") is not None:
        options["byzantine"] = tolerates(rule, updates)
    for name in ("selected", "size"):
        if options.get(name) is not None:
            options[name] = min(options[name], updates)
    return functools.partial(rule.func, *rule.args, **options)


def _chain_tolerates(options: Mapping[str, Any], clients: int) -> int:
    """Least of the steps' and the rule's; a bucket is lost to one attacker in it."""
    most, rows = (clients - 1) // 2, clients
    for step in options["steps"]:
        inner, bound = unwrap(step)
        if inner is bucketing:
            rows = -(-rows // int(bound.get("size", 2)))
        elif bound.get("byzantine") is not None:
            most = min(most, int(bound["byzantine"]))
    return min(most, tolerates(options["rule"], rows))
