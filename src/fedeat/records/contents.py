"""What a directory holds, and whether a run of a configuration may start, or go on, in it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from fedeat.errors import RecordError
from fedeat.records.configurations import changed_keys, differing, read_config
from fedeat.records.versions import ENVIRONMENT, threads_before

_ROUND = re.compile(r"round-(\d+)")


def kind_of(path: Path) -> Literal["run", "comparison"] | None:
    """What a directory holds records of; None where it has none, or none that says."""
    if (path / "results.json").exists():
        return "comparison"
    if any((path / name).exists() for name in ("metrics.jsonl", "partition.json", "evaluation.json", "checkpoints")):
        return "run"
    return "comparison" if (path / "config.toml").is_file() and (path / "runs").is_dir() else None


def is_settled(path: Path) -> bool:
    """Whether the config.toml of a run's directory must stay: a round was finished with it, or no run wrote it."""
    return not (path / ENVIRONMENT).is_file() or has_results(path)


def has_results(path: Path) -> bool:
    """Whether a run's directory holds a finished round or an evaluation."""
    return bool(checkpoints(path)) or (path / "evaluation.json").is_file()


def checkpoints(path: Path) -> list[Path]:
    """Whole checkpoints of a run's directory, oldest first."""
    parent = path / "checkpoints"
    rounds = {} if not parent.is_dir() else {path: _ROUND.fullmatch(path.name) for path in parent.iterdir()}
    found = [(int(match[1]), path) for path, match in rounds.items() if match is not None]
    return [path for _, path in sorted(found)]


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The finished evaluation of a run directory, None while there is none.

    Raises:
        RecordError: the file is there and holds something else.
    """
    file = path / "evaluation.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found["rows"], list):
            return dict(found)
        problem = '"rows" is not a list'
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise RecordError(f"{file} is not a finished evaluation: {problem}. Remove it to evaluate once more.")


def check(path: Path, config_toml: str) -> None:
    """Checks that what a directory holds of a run, be it nothing, begun or finished, is of this configuration.

    Raises:
        RecordError: the directory holds a comparison, a run of another configuration, or checkpoints of an unknown
            one. A run that has finished no round may be corrected, and another spelling of the same paths, or the
            number of threads that the run began with, is no other configuration.
    """
    file = path / "config.toml"
    if kind_of(path) == "comparison":
        raise RecordError(
            f"{path} holds a comparison, and a run needs a directory of its own. Choose another directory, or go on "
            "with the comparison by the command that began it: fedeat compare."
        )
    if not file.is_file() and checkpoints(path):
        raise RecordError(
            f"{path} holds checkpoints but no config.toml to say of what. Choose another directory, or put the file "
            "back."
        )
    if not file.is_file() or not is_settled(path):
        return
    before, after = read_config(file), tomllib.loads(config_toml)
    began = threads_before(path)  # where a configuration leaves the threads to torch
    changes = changed_keys(*({**config, "threads": config.get("threads") or began} for config in (before, after)))
    if changes or not before:
        raise RecordError(
            f"{path} holds a run of another configuration{differing(changes)}. Choose another directory, remove this "
            f"one, or go on with the run it holds: fedeat run --resume {path}"
        )
