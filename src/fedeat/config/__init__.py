"""A run's configuration: its keys (`schema`), what they must be together (`consistency`), TOML in and out (`toml`)."""

from fedeat.config.consistency import cohort_problems, training_alone
from fedeat.config.rules import RULES, aggregation_rule
from fedeat.config.schema import (
    AggregationSection,
    AttackName,
    Config,
    PartitionSection,
    PerturbationSection,
    Source,
)
from fedeat.config.toml import load, override, parse, read, to_toml, with_values

__all__ = [
    "RULES",
    "AggregationSection",
    "AttackName",
    "Config",
    "PartitionSection",
    "PerturbationSection",
    "Source",
    "aggregation_rule",
    "cohort_problems",
    "load",
    "override",
    "parse",
    "read",
    "to_toml",
    "training_alone",
    "with_values",
]
