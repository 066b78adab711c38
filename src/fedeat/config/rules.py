"""The aggregation rules and the steps before them that a configuration can name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from fedeat import aggregation
from fedeat.aggregation import AnyRule, CoordinateRule, Rule, Step

RuleName: TypeAlias = Literal[
    "mean", "geometric_median", "smoothed_geometric_median", "coordinate_median", "trimmed_mean", "mean_around_median",
    "krum", "multi_krum", "minimum_diameter", "centred_clipping", "norm_filter",
]  # fmt: skip
RULES: Mapping[RuleName, Rule | CoordinateRule] = {
    "mean": aggregation.mean,
    "geometric_median": aggregation.geometric_median,
    "smoothed_geometric_median": aggregation.smoothed_geometric_median,
    "coordinate_median": aggregation.coordinate_median,
    "trimmed_mean": aggregation.trimmed_mean,
    "mean_around_median": aggregation.mean_around_median,
    "krum": aggregation.krum,
    "multi_krum": aggregation.multi_krum,
    "minimum_diameter": aggregation.minimum_diameter,
    "centred_clipping": aggregation.centred_clipping,
    "norm_filter": aggregation.norm_filter,
}
"""Each rule that a configuration can name. A trusted reference needs data of the server's own: from Python alone."""

StepName: TypeAlias = Literal["nearest_neighbour_mixing", "norm_clipping", "adaptive_clipping"]
STEPS: Mapping[StepName, Step] = {
    "nearest_neighbour_mixing": aggregation.nearest_neighbour_mixing,
    "norm_clipping": aggregation.norm_clipping,
    "adaptive_clipping": aggregation.adaptive_clipping,
}
"""Each step before a rule that a configuration can name."""

COUNTS_ATTACKERS = frozenset(
    {"trimmed_mean", "mean_around_median", "krum", "multi_krum", "minimum_diameter", "norm_filter"}
    | {"nearest_neighbour_mixing", "adaptive_clipping"}
)
"""Rules and steps that take f, the number of clients to withstand."""


def aggregation_rule(
    rule: RuleName, before: Sequence[StepName], *, byzantine: int | None, tolerance: float | None = None
) -> AnyRule:
    """A rule after its steps, with f given to each that takes it.

    Args:
        rule: its name.
        before: names of the steps, first to last; none before a coordinate-wise rule.
        byzantine: f >= 0; None leaves each its own default.
        tolerance: of the geometric median; None leaves its default.
    """
    options: dict[str, Any] = {}
    if rule == "geometric_median" and tolerance is not None:
        options["tolerance"] = tolerance
    chosen = _counting(rule, RULES[rule], byzantine, **options)
    if not before:
        return chosen
    steps = [_counting(name, STEPS[name], byzantine) for name in before]
    return aggregation.chain(*steps, rule=chosen)


def _counting(name: str, function: object, byzantine: int | None, **options: Any) -> functools.partial[Any]:
    if byzantine is not None and name in COUNTS_ATTACKERS:
        options["byzantine"] = byzantine
    return functools.partial(cast(Callable[..., Any], function), **options)
