"""Robust aggregation: `aggregate` applies a rule to client updates; rules turn inner products into client weights.

pipeline         updates and a rule in, one update and the record of how it came about out
spaces           one group of tensors, decided and combined: as they are, as LoRA products, or coordinate by coordinate
weighing         a rule's decision on inner products, and what their rounding may have cost
rules            mean, Krum, clipping and others on the Gram matrix
weiszfeld        the geometric median by `iterates`, proved by a `certificate`; `smoothed` is RFA's
half_precision   the same for many clients, by products of rounded updates; `sampling` by a part of the coordinates,
                 without a certificate; both by `rough_products` and exact distances
coordinatewise   rules that act on each coordinate by itself; `sorting` finds their order statistics
preaggregation   steps before a rule: bucketing, nearest-neighbour mixing, clipping
resilience       how many attackers each rule withstands, and how many turn the median around
secure           the geometric median where the server sees sums over clients alone
"""

from fedeat.aggregation.coordinatewise import CoordinateRule, coordinate_median, mean_around_median, trimmed_mean
from fedeat.aggregation.pipeline import Aggregate, Space, aggregate
from fedeat.aggregation.preaggregation import (
    Mixing,
    Step,
    adaptive_clipping,
    bucketing,
    chain,
    nearest_neighbour_mixing,
    norm_clipping,
)
from fedeat.aggregation.resilience import AnyRule, resting_place, tolerates, turning_share
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
from fedeat.aggregation.secure import SecureMedian, secure_geometric_median, secure_mean, sketch
from fedeat.aggregation.smoothed import smoothed_geometric_median
from fedeat.aggregation.weiszfeld import ClientWeights, geometric_median

__all__ = [
    "Aggregate",
    "AnyRule",
    "ClientWeights",
    "CoordinateRule",
    "Mixing",
    "Rule",
    "SecureMedian",
    "Space",
    "Step",
    "adaptive_clipping",
    "aggregate",
    "bucketing",
    "centred_clipping",
    "chain",
    "coordinate_median",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "minimum_diameter",
    "multi_krum",
    "nearest_neighbour_mixing",
    "norm_clipping",
    "norm_filter",
    "resting_place",
    "secure_geometric_median",
    "secure_mean",
    "sketch",
    "smoothed_geometric_median",
    "tolerates",
    "trimmed_mean",
    "trusted_reference",
    "turning_share",
]
