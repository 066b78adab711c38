"""One group of tensors from the clients' updates to its aggregate: decided by the rule, and combined.

There are three ways: distances between the tensors as they are, distances between the products of LoRA factors, and
each coordinate by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedeat import geometry
from fedeat.aggregation.half_precision import half_precision_median
from fedeat.aggregation.resilience import unwrap
from fedeat.aggregation.rules import Rule
from fedeat.aggregation.sampling import sampled_geometric_median
from fedeat.aggregation.weighing import weigh
from fedeat.aggregation.weiszfeld import ClientWeights, geometric_median
from fedeat.geometry.layout import UpdateSource
from fedeat.geometry.product_space import Lora
from fedeat.geometry.recombination import recombine, sum_factors
from fedeat.geometry.sources import blocks

Combination: TypeAlias = Literal["factors", "stacked", "recompressed"]


@dataclass(frozen=True)
class Part:
    """What became of one group of tensors.

    Attributes:
        decided: what the rule decided for it.
        value: its aggregate.
        passes: how often it was read.
        discarded: share of its squared norm that recompression lost, else 0.
    """

    decided: ClientWeights
    value: Tensor | dict[str, Tensor]
    passes: int
    discarded: float = 0.0


def in_factors(source: UpdateSource, prior: Tensor, *, rule: Rule, sample: torch.Generator | None) -> Part:
    """Weighs by distances between the tensors as they are.

    Args:
        source: n updates.
        prior: (n,) float64, summing to one.
        rule: on inner products.
        sample: of the secret coordinates of a sampled geometric median; None for all of them.
    """
    function, options = unwrap(rule)
    quick = None if sample is None else sampled_geometric_median(source, prior, sample)
    if quick is None and function is geometric_median:
        quick = half_precision_median(source, prior, **options)
    if quick is None:
        decided, found = weigh(source, prior, rule)
        return Part(decided, geometry.combine(source, decided.weights, centre=found.centre), found.passes + 1)
    decided, readings, point = quick
    if point is not None:
        return Part(decided, point, readings)
    return Part(decided, geometry.combine(source, decided.weights), readings + 1)


def in_products(
    source: UpdateSource, prior: Tensor, *, rule: Rule, lora: Lora, combine: Combination, rank: int | None
) -> Part:
    """Weighs by distances between the products of LoRA factors.

    Args:
        source: n updates.
        prior: (n,) float64, summing to one.
        rule: on inner products.
        lora: how to understand the factors.
        combine: as `aggregate`.
        rank: of a recompressed adapter, None for any other.
    """
    decided, found = weigh(source, prior, rule, lora)
    if combine == "factors":
        return Part(decided, sum_factors(source, decided.weights, lora), found.passes + 1)
    value, lost = recombine(source, decided.weights, lora, rank=rank)
    return Part(decided, value, found.passes + 1, lost)


def by_coordinate(
    source: UpdateSource, prior: Tensor, *, columns: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Part:
    """Streams all coordinates through a coordinate-wise rule; weights are each client's share of the coordinates.

    Args:
        source: n updates.
        prior: (n,) float64, summing to one.
        columns: the rule's `apply`.
    """
    result = geometry.Assembly(source)
    shares = torch.zeros(len(source.labels), dtype=torch.float64)
    for segments, block in blocks(source):
        finite = torch.isfinite(block).all(1)
        if not bool(finite.all()):
            geometry.require_finite(source, torch.nonzero(~finite).flatten().tolist())
        values, counts = columns(block, prior)
        result.write(segments, values)
        shares += counts.cpu()
    return Part(ClientWeights(shares / shares.sum()), result.value(), passes=1)
