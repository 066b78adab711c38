"""Rules that a configuration names, with their steps and options."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import fedeat
from fedeat import aggregation
from fedeat.config import RULES, aggregation_rule
from fedeat.config.rules import COUNTS_ATTACKERS, STEPS, RuleName, StepName


def updates() -> torch.Tensor:
    rows = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    rows[0] *= 100
    return rows


def test_every_name_has_its_function() -> None:
    assert set(RULES) == set(get_args(RuleName))
    assert set(STEPS) == set(get_args(StepName))
    assert set(RULES) | set(STEPS) > COUNTS_ATTACKERS


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_named_rule_is_the_function_of_that_name(name: RuleName) -> None:
    value = fedeat.aggregate(updates(), rule=aggregation_rule(name, (), byzantine=None)).value
    assert torch.equal(value, fedeat.aggregate(updates(), rule=getattr(aggregation, name)).value)


@pytest.mark.parametrize("name", sorted(COUNTS_ATTACKERS & set(RULES)))
def test_the_number_to_withstand_reaches_the_rule(name: RuleName) -> None:
    rule = aggregation_rule(name, (), byzantine=1)
    assert aggregation.tolerates(rule, 9) == 1
    assert bool(torch.isfinite(fedeat.aggregate(updates(), rule=rule).value).all())


def test_steps_come_before_the_rule_in_their_order() -> None:
    named = aggregation_rule("geometric_median", ("adaptive_clipping", "nearest_neighbour_mixing"), byzantine=None)
    steps = (aggregation.adaptive_clipping, aggregation.nearest_neighbour_mixing)
    chained = aggregation.chain(*steps, rule=fedeat.geometric_median)
    expected = fedeat.aggregate(updates(), rule=chained).value
    assert torch.equal(fedeat.aggregate(updates(), rule=named).value, expected)
