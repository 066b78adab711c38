"""Errors that a person can act on.

Every message says what was wrong, what was expected, what was got, and the remedy. The command line prints it
without a traceback and exits with code 2.

    FedeatError
    ├── ConfigError        one or more problems in a configuration, reported together
    ├── DataError          a data file that cannot be read as what it claims to be
    ├── ModelError         a model that cannot be loaded, perturbed or adapted
    ├── RecordError        a run directory that is missing, foreign or half written
    ├── UpdateError        client updates that cannot be aggregated
    └── QuorumError        too few usable client updates in a round
"""

from __future__ import annotations

from collections.abc import Sequence


class FedeatError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FedeatError):
    """One or more problems in a configuration.

    Attributes:
        problems: every problem found, one line each.
    """

    def __init__(self, problems: Sequence[str], *, source: str = "configuration") -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in {source}:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class DataError(FedeatError):
    """A data file that is missing, broken, or lacks the fields it must have."""


class ModelError(FedeatError):
    """A model that cannot be loaded, perturbed through its embeddings, or adapted."""


class RecordError(FedeatError):
    """A run directory that is missing, belongs to another configuration, or cannot be read."""


class UpdateError(FedeatError, ValueError):
    """Client updates that cannot be aggregated; the message names each client and its reason."""


class QuorumError(FedeatError):
    """Fewer usable client updates in a round than the quorum asks for."""
