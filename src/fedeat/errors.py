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

import errno
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


_REMEDIES = {
    FileNotFoundError: "Check the path.",
    PermissionError: "Choose a place that you may use, or change its permissions.",
    IsADirectoryError: "Expected a file; check the path.",
    NotADirectoryError: "Expected a directory; a file is in its place.",
    FileExistsError: "Something else has this name; choose another.",
}


def explanation(error: BaseException) -> str | None:
    """One message for what can go wrong on any machine: files, memory, disk. None for anything else, a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"out of memory: {text[:300] or 'no more can be had'}. Lower client.batch_size, evaluation.batch_size or "
            "data.max_length, set model.gradient_checkpointing = true, or load the base as bfloat16 (model.dtype)."
        )
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        remedy = "Free some space." if error.errno == errno.ENOSPC else "Check the disk and the path."
        return f"{place}{error.strerror or text or type(error).__name__}. {_REMEDIES.get(type(error), remedy)}"
    return None
