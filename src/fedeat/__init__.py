"""Robust federated fine-tuning of large language models (FedEAT; Pang et al., 2025).

The names below need torch and NumPy alone; models, engines and the command line are imported from their modules.
"""

from fedeat.aggregation import (
    Aggregate,
    ClientWeights,
    CoordinateRule,
    Rule,
    aggregate,
    coordinate_median,
    geometric_median,
    krum,
    mean,
    mean_around_median,
    multi_krum,
    tolerates,
    trimmed_mean,
)
from fedeat.algorithm import LocalTraining, Round, client_update, run_rounds, server_round
from fedeat.embeddings import embedding_unit, perturbed, worst_case
from fedeat.errors import (
    ConfigError,
    DataError,
    FedeatError,
    ModelError,
    QuorumError,
    RecordError,
    UpdateError,
)
from fedeat.perturbation import fgsm, pgd, random
from fedeat.updates import ClientUpdate, Rejection

__version__ = "0.1.0"

__all__ = [
    "Aggregate",
    "ClientUpdate",
    "ClientWeights",
    "ConfigError",
    "CoordinateRule",
    "DataError",
    "FedeatError",
    "LocalTraining",
    "ModelError",
    "QuorumError",
    "RecordError",
    "Rejection",
    "Round",
    "Rule",
    "UpdateError",
    "aggregate",
    "client_update",
    "coordinate_median",
    "embedding_unit",
    "fgsm",
    "geometric_median",
    "krum",
    "mean",
    "mean_around_median",
    "multi_krum",
    "perturbed",
    "pgd",
    "random",
    "run_rounds",
    "server_round",
    "tolerates",
    "trimmed_mean",
    "worst_case",
]
